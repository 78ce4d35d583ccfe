"""`dgemma` as a process of its own: in pipes, and in terminals that are looked at."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import dgemma
from dgemma import embedded
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.terminal.info import describe

from .conftest import PATIENCE, Process

PUZZLE = "53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9"
SOLUTION = [
    "534678912",
    "672195348",
    "198342567",
    "859761423",
    "426853791",
    "713924856",
    "961537284",
    "287419635",
    "345286179",
]
needs_sudoku = pytest.mark.skipif("sudoku" not in embedded.names(), reason="the embedded Sudoku model is not there")
LAST_STEP = re.compile(r"\x1b\[2mblock (\d+)")


def dgemma_run(*arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def answer(small_model: Path) -> str:
    """What the small model says to "hello"; the command must say it too."""
    return dgemma.load(small_model).generate("hello").text


class TestWithoutTorch:
    """What needs no network does not wait for torch."""

    def imported(self, *arguments: str | Path) -> tuple[int, set[str], str]:
        """Exit code, top-level modules, and the error of a call that ends before or without a model."""
        code = (
            "import sys; from dgemma import cli\ntry: cli.main()\n"
            "finally: print('MODULES', *{n.split('.')[0] for n in sys.modules}, file=sys.stderr)"
        )
        call = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
        error, _, modules = done.stderr.rpartition("MODULES")
        return done.returncode, set(modules.split()), error

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["chat", "--help"], ["info", "--help"]])
    def test_help(self, arguments: list[str]):
        code, modules, error = self.imported(*arguments)
        assert (code, error) == (0, "")
        assert "typer" in modules
        assert not modules & {"torch", "numpy", "huggingface_hub", "rich"}

    def test_info(self, small_model: Path):
        code, modules, _ = self.imported("info", small_model)
        assert code == 0
        assert not modules & {"torch", "numpy", "huggingface_hub"}

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["run", "--no-such-flag"], 2, "--no-such-flag"),
            (["no-such-command"], 2, "no-such-command"),
            (["info"], 2, "model"),
            (["info", "./nowhere"], 1, "nowhere"),
            (["run", "./nowhere", "-p", "x"], 1, "nowhere"),
            (["run", "MODEL"], 2, "the prompt is empty"),
            (["run", "MODEL", "-p", " "], 2, "the prompt is empty"),
            (["run", "MODEL", "-p", b"\xff"], 2, "UTF-8"),
            (["run", "MODEL", "-p", "x", "--steps", "0"], 2, "max_denoising_steps"),
            (["run", "MODEL", "-p", "x", "--t-min", "0.9"], 2, "t_min must not exceed t_max"),
            (["run", "MODEL", "-p", "x", "--entropy-bound", "nan"], 2, "entropy_bound"),
            (["run", "MODEL", "-p", "x", "--seed", "-1"], 2, "--seed"),
            (["run", "MODEL", "-p", "x", "--dtype", "int8"], 2, "bfloat16"),
            (["run", "MODEL", "-p", "x", "--json", "--visual"], 2, "--json and --visual"),
            (["run", "MODEL", "-p", "x", "--pace", "1"], 2, "--pace has no effect"),
            (["run", "MODEL", "-p", "x", "--visual", "--pace", "-1"], 2, "--pace takes 0 to 60"),
            (["run", "MODEL", "-p", "x", "--temperature", "1"], 2, "--temperature needs --autoregressive"),
            (["run", "MODEL", "-p", "x", "--autoregressive", "--temperature", "nan"], 2, "--temperature must be"),
            (["run", "MODEL", "-p", "x", "--autoregressive", "--steps", "3"], 2, "--max-denoising-steps has no effect"),
            (["run", "MODEL", "-p", "x", "--autoregressive", "--visual"], 2, "--visual has no effect"),
            (["run", "MODEL", "-p", "x", "--autoregressive", "--seed", "3"], 2, "--seed has no effect"),
            (["chat", "MODEL", "--autoregressive", "--t-max", "1"], 2, "--t-max has no effect"),
        ],
    )
    def test_a_wrong_call_is_one_line(self, arguments: list[str], code: int, message: str, small_model: Path):
        given = [str(small_model) if argument == "MODEL" else argument for argument in arguments]
        found, modules, error = self.imported(*map(os.fsdecode, given))
        assert found == code
        assert error.startswith("dgemma: ")
        assert error.count("\n") == 1
        assert message in error
        assert "torch" not in modules


def test_each_decoding_option_is_a_flag_with_the_default_of_the_config():
    for command in ("run", "chat"):
        told = " ".join(dgemma_run(command, "--help").stdout.split())
        for field in fields(GenerationConfig):
            if field.type in (int, float) and "help" in field.metadata:
                flag = rf"--{field.name.replace('_', '-')}[^-].{{0,40}}{re.escape(field.metadata['help'])}"
                assert re.search(rf"{flag} \[default: \({field.default}\)\]", told), field.name
    assert "-n, --max-new-tokens" in told
    assert "--max-denoising-steps, --steps" in told


class TestRun:
    def test_a_pipe_gets_the_answer_and_a_line_feed(self, small_model: Path, answer: str):
        done = dgemma_run("run", small_model, "-p", "hello")
        assert (done.returncode, done.stdout) == (0, answer + "\n")
        assert done.stderr == "cut at 40 tokens (--max-new-tokens)\n"

    @pytest.mark.parametrize("flags", [[], ["-p", "-"]])
    def test_the_prompt_may_come_from_a_pipe(self, flags: list[str], small_model: Path, answer: str):
        assert dgemma_run("run", small_model, *flags, stdin="hello\n").stdout == answer + "\n"

    def test_json_has_the_telemetry(self, small_model: Path):
        done = dgemma_run("run", small_model, "-p", "hello", "--json", "--seed", "7", "-n", "20", "--steps", "3")
        told = json.loads(done.stdout)
        generation = dgemma.load(small_model).generate("hello", seed=7, max_new_tokens=20, max_denoising_steps=3)
        assert told["tokens"] == generation.tokens
        assert told["text"] == generation.text
        assert (told["seed"], told["finish_reason"]) == (7, "length")
        assert told["steps"] == generation.steps
        assert told["tokens_per_forward"] == generation.tokens_per_forward
        assert set(told["seconds"]) == {"prefill", "denoise", "commit"}
        assert done.stderr == ""

    def test_left_to_right(self, small_model: Path):
        done = dgemma_run("run", small_model, "-p", "hello", "--autoregressive", "-n", "9", "--json")
        expected = dgemma.load(small_model).generate("hello", autoregressive=True, max_new_tokens=9)
        assert json.loads(done.stdout)["tokens"] == expected.tokens

    def test_system_message_and_thinking_reach_the_template(self, small_model: Path):
        done = dgemma_run("run", small_model, "-p", "hello", "--system", "be brief", "--think", "--json")
        lm = dgemma.load(small_model)
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
        assert json.loads(done.stdout)["prompt_tokens"] == len(lm.tokens(messages, think=True))

    def test_an_error_of_the_model_is_one_line(self, small_model: Path):
        done = dgemma_run("run", small_model, "-p", "hello", "-n", "30000")
        assert done.returncode == 1
        assert re.fullmatch(r"dgemma: prompt and answer need \d+ positions.*\n", done.stderr)

    def test_a_reader_that_leaves_is_no_error_message(self, small_model: Path):
        command = [sys.executable, "-m", "dgemma", "run", str(small_model), "-p", "hello", "-n", "200"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(PATIENCE) == 1
        assert error == ""
        process.stderr.close()

    def test_characters_that_the_encoding_lacks_are_replaced(self, small_model: Path):
        done = dgemma_run("run", small_model, "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert done.returncode == 0
        failed = dgemma_run("run", "./ñ", "-p", "x", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert failed.stderr == "dgemma: there is no directory ?\n"

    @pytest.mark.parametrize("columns", [20, 80])
    def test_on_a_terminal_the_canvas_moves_and_the_answer_stays(self, columns: int, small_model: Path, answer: str):
        process = Process(["run", str(small_model), "-p", "hello", "--visual"], columns)
        assert process.finish() == 0
        assert {int(block) for block in LAST_STEP.findall(process.raw.decode())} == {1, 2, 3}
        shown = "".join(process.lines)
        assert re.sub(r"\s", "", shown).startswith(re.sub(r"\s", "", answer) + "40tokens")
        assert "converged" in re.sub(r"\s", "", shown)
        assert "--max-new-tokens" in re.sub(r"\s", "", shown)

    def test_a_dumb_terminal_gets_no_escape_codes(self, small_model: Path, answer: str):
        process = Process(["run", str(small_model), "-p", "hello", "--visual"], TERM="dumb")
        assert process.finish() == 0
        assert b"\x1b" not in process.raw
        assert process.raw.decode().replace("\r\n", "\n").startswith(answer)

    def test_no_color(self, small_model: Path):
        process = Process(["run", str(small_model), "-p", "hello", "--visual"], NO_COLOR="1")
        assert process.finish() == 0
        assert set(re.findall(rb"\x1b\[([\d;]*)m", process.raw)) == {b"0", b"1", b"2", b"4"}

    def test_ctrl_c_ends_it_without_a_traceback(self, small_model: Path):
        process = Process(["run", str(small_model), "-p", "hello", "--visual", "-n", "15000"])
        process.wait_for("step")
        process.send("\x03")
        assert process.finish() == 130
        assert b"Traceback" not in process.raw
        assert not any("step" in line for line in process.lines)


@needs_sudoku
class TestSudoku:
    def test_it_solves_and_says_that_it_is_right(self):
        done = dgemma_run("run", "sudoku", "-p", PUZZLE)
        assert (done.returncode, done.stdout.split()) == (0, SOLUTION)
        assert done.stderr.startswith("right: ")

    def test_on_a_terminal_it_looks_like_a_grid(self):
        process = Process(["run", "--visual", "-p", PUZZLE], columns=40)
        assert process.finish() == 0
        assert process.lines[:9] == SOLUTION
        assert any(line.startswith("right: ") for line in process.lines)

    def test_at_a_pace_every_step_is_shown(self):
        process = Process(["run", "--visual", "--pace", "0.02", "-p", PUZZLE])
        assert process.finish() == 0
        told = [int(number) for number in re.findall(rb"step (\d+) ", process.raw)]
        assert told == list(range(1, told[-1] + 1))
        assert f"{told[-1]} steps" in "\n".join(process.lines)

    def test_a_wrong_answer_is_an_error(self):
        done = dgemma_run("run", "sudoku", "-p", PUZZLE, "-n", "30", "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["verdict"]["right"] is False

    @pytest.mark.parametrize(
        ("puzzle", "message"),
        [
            ("123", "81 cells"),
            ("x" * 81, "'x'"),
            ("55" + "." * 79, "contradict"),
            ("12345678." + "........9" + "." * 63, "no solution"),
        ],
    )
    def test_a_puzzle_that_is_none(self, puzzle: str, message: str):
        done = dgemma_run("run", "sudoku", "-p", puzzle)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr

    def test_in_a_chat_each_puzzle_stands_alone(self):
        done = dgemma_run("chat", "sudoku", stdin=f"{PUZZLE}\n{PUZZLE}\n")
        assert done.returncode == 0
        assert done.stdout.split() == SOLUTION * 2
        assert done.stderr.count("right: ") == 2


class TestInfo:
    def test_a_cached_token_of_the_released_model(self, shared: Path):
        config = ModelConfig.from_file(shared / "config.json")
        by_type = config.cache_bytes_per_token(2)
        full, sliding = config.layer_types.count("full_attention"), config.layer_types.count("sliding_attention")
        kv = 2 * 2  # keys and values, two bytes each
        assert by_type["full_attention"] == full * config.num_global_key_value_heads * config.global_head_dim * kv
        assert by_type["sliding_attention"] == sliding * config.num_key_value_heads * config.head_dim * kv

    def test_the_cache_takes_what_it_says(self, small_model: Path):
        import torch

        lm = dgemma.load(small_model)
        for tokens in (1, 16, 17, 31, 32, 47, 48, 100):
            cache = lm.model.new_cache()
            lm.model.encode([torch.ones(tokens, dtype=torch.int64)], cache)
            assert cache.nbytes == lm.model.config.cache_bytes(tokens, 4), tokens

    def test_lines(self, small_model: Path):
        lines = list(describe(small_model))
        total = sum(p.numel() for p in dgemma.load(small_model).model.state_dict().values())
        assert any(line.startswith("parameters") and f"{total / 1000:.2f} K" in line for line in lines)
        config = ModelConfig.from_file(small_model / "config.json")
        assert any(f"{config.cache_bytes(8192, 2) / 2**10:.2f} KiB at 8K" in line for line in lines)
        assert not any("at 32K" in line for line in lines)  # more than the model can hold
        assert dgemma_run("info", small_model).stdout.splitlines() == lines

    def test_bits_and_bytes_of_parts(self, small_model: Path):
        config = ModelConfig.from_file(small_model / "config.json")
        lines = list(describe(small_model))
        [embedding] = [line for line in lines if line.startswith("  embedding")]
        assert f"{config.vocab_size * config.hidden_size * 4 / 2**10:.2f} KiB  32.00 bits a weight" in embedding
        assert any(line.split() == ["format", "plain"] for line in lines)

    @pytest.mark.parametrize(
        ("config", "told"),
        [
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {
                        "group_0": {
                            "format": "pack-quantized",
                            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
                        }
                    },
                },
                "compressed-tensors, int4 in groups of 32",
            ),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
                },
                "compressed-tensors, FP8 by rows",
            ),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4 in groups of 16"),
            ({"quant_method": "awq"}, "quant_method 'awq'; known are 'compressed-tensors' and 'modelopt'"),
        ],
    )
    def test_format(self, tmp_path: Path, shared: Path, config: dict, told: str):
        values = json.loads((shared / "config.json").read_text()) | {"quantization_config": config}
        (tmp_path / "config.json").write_text(json.dumps(values))
        [line] = [line for line in describe(tmp_path) if line.startswith("format")]
        assert line.endswith(told)

    def test_cards_of_the_released_model(self, tmp_path: Path, shared: Path):
        shutil.copy(shared / "config.json", tmp_path)
        rows = {line.split()[1]: line.split()[4:] for line in describe(tmp_path) if line.startswith("  in ")}
        assert rows["BF16"] == ["–", "–", "–", "–", "256K", "256K"]
        assert rows["FP8"] == ["–", "–", "32K", "256K", "256K", "256K"]
        assert rows["INT4"] == ["–", "32K", "256K", "256K", "256K", "256K"]
