"""The arithmetic of docs/scaling.md, held against measurements and against itself."""

from pathlib import Path

import pytest

from dgemma.bench import scaling
from dgemma.bench.scaling import AIM, DEVICES, TODAY, crossing, rates, step, tables, traffic

H100 = DEVICES["h100"]
ONE = dict.fromkeys(TODAY, 1.0)


def test_it_says_what_was_measured() -> None:
    """`dgemma bench step --shape 26b --device cuda` on an H100: floors 18.1 and 10.4 ms, a bfloat16 step 31.0."""
    assert step(H100, apart=ONE) == pytest.approx(18.1e-3, rel=0.05)
    assert step(H100, "fp8", apart=ONE) == pytest.approx(10.4e-3, rel=0.05)
    assert step(H100, apart=TODAY) == pytest.approx(31.0e-3, rel=0.1)


def test_devices_of_a_node_help_and_a_second_node_does_not() -> None:
    times = [step(H100, "fp8", devices) for devices in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[-1] < 8
    assert step(H100, "fp8", 16) > times[-1]
    assert traffic(H100, 1, 1) == (0, 0, 0)
    sent, sending, waiting = traffic(H100, 2, 4)
    assert sent == 60 * 4 * 256 * 2816 * 2
    assert sending == sent / H100.link
    assert waiting == 60 * H100.latency


def test_rows_help_canvases_until_arithmetic_binds_and_others_longer() -> None:
    found = [rates(H100, "fp8", 1, batch) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    canvases, singles = zip(*found, strict=True)
    assert canvases[0] > 2 * singles[0]
    assert canvases[-1] == pytest.approx(canvases[-2], rel=0.01)
    assert singles[-1] > 1.3 * singles[-2]
    turn = crossing(H100, "fp8")
    assert rates(H100, "fp8", 1, turn)[0] <= rates(H100, "fp8", 1, turn)[1]
    assert rates(H100, "fp8", 1, turn // 2)[0] > rates(H100, "fp8", 1, turn // 2)[1]


def test_the_page_holds_the_tables_of_today() -> None:
    page = (Path(scaling.__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
    for line in tables().splitlines():
        assert line in page
    assert set(AIM) == set(TODAY)
