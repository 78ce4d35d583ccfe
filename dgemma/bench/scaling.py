"""`python -m dgemma.bench.scaling`: the released size on several devices, by arithmetic, for docs/scaling.md.

Each part of a step takes the longer of its bytes at the device's bandwidth and its operations at its rate, times how
far from that the part is; devices share bytes and operations evenly, and after attention and after the experts of each
layer they add their results up. Nothing here is measured but `TODAY`.
"""

from dataclasses import dataclass
from functools import cache

TB, TF, GB = 1e12, 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """Bytes and bfloat16 operations a second, bytes a second to each neighbour and seconds until one hears another.

    Of the makers' data sheets, except `h100`'s first two, which `dgemma bench step` measured.
    """

    bandwidth: float
    rate: float
    link: float = 450 * GB
    latency: float = 8e-6
    dollars_an_hour: float = 3.0


DEVICES = {
    "h100": Device(2.96 * TB, 770 * TF),
    "h200": Device(4.3 * TB, 790 * TF, dollars_an_hour=3.5),
    "b200": Device(7.4 * TB, 1800 * TF, link=900 * GB, dollars_an_hour=5.5),
}
NODE = 8
BETWEEN_NODES, FAR = 50 * GB, 25e-6
"""Bytes a second of a network card, one for each device, and its latency."""

BYTES = {"bf16": 1.0, "fp8": 0.5, "int4": 0.28}
"""Of a weight, as a share of bfloat16's; the vocabulary's stay as they are."""
TODAY = {"attention": 4.0, "dense": 2.8, "experts": 1.52, "vocabulary": 5.0}
"""How far each part of this project's bfloat16 step was from its floor on an H100."""
AIM = dict.fromkeys(TODAY, 1.25)
TOKENS_A_STEP = 19.7
"""Of a canvas, as the model's paper reports for its own evaluations."""


@cache
def _needs(prompt: int, batch: int, length: int) -> dict[str, tuple[float, float]]:
    import torch

    from dgemma.bench.step import costs
    from dgemma.checkpoints import release
    from dgemma.checkpoints.empty import empty_model

    return costs(empty_model(release.TEXT, torch.bfloat16).to(torch.bfloat16), prompt, batch, length)


def step(
    device: Device,
    format: str = "bf16",
    devices: int = 1,
    batch: int = 1,
    prompt: int = 1024,
    length: int = 0,
    apart: dict[str, float] = AIM,
) -> float:
    """Seconds of a pass over `length` tokens of each of `batch` rows, a canvas if 0; one is autoregressive decoding."""
    total = 0.0
    for part, (bytes, flops) in _needs(prompt, batch, length).items():
        if length == 1 and part == "vocabulary":  # no expected embedding
            bytes, flops = bytes / 2, flops / 2
        read = bytes * (1 if part == "vocabulary" else BYTES[format])
        total += apart[part] * max(read / device.bandwidth, flops / device.rate) / devices
    return total + sum(traffic(device, devices, batch, length)[1:])


def traffic(device: Device, devices: int, batch: int, length: int = 0) -> tuple[float, float, float]:
    """Bytes that each device sends in a step, and the seconds of sending and of waiting: a ring's sums, two a layer."""
    from dgemma.checkpoints import release

    if devices == 1:
        return 0.0, 0.0, 0.0
    config = release.TEXT
    rows, sums = batch * (length or config.canvas_length), 2 * len(config.layer_types)
    sent = sums * 2 * (devices - 1) / devices * rows * config.hidden_size * 2
    inside = devices <= NODE
    link, latency = (device.link, device.latency) if inside else (BETWEEN_NODES, FAR)
    return sent, sent / link, sums * latency


def rates(device: Device, format: str, devices: int, batch: int, apart: dict[str, float] = AIM) -> tuple[float, float]:
    """Tokens a second of all rows: canvases, and one token after the other."""
    canvas = batch * TOKENS_A_STEP / step(device, format, devices, batch, apart=apart)
    return canvas, batch / step(device, format, devices, batch, length=1, apart=apart)


def crossing(device: Device, format: str, apart: dict[str, float] = AIM) -> int:
    """The smallest power of two of rows at which one token after the other gives more of them."""
    batch = 1
    while (found := rates(device, format, 1, batch, apart))[0] > found[1] and batch < 1 << 14:
        batch *= 2
    return batch


def dollars(device: Device, tokens_a_second: float, devices: int = 1) -> float:
    """Of a million tokens."""
    return devices * device.dollars_an_hour / 3600 / tokens_a_second * 1e6


def tables() -> str:
    """All of them, in Markdown."""
    lines = [
        "| one device, one row | format | floor, ms | aim, ms | tokens a second | today, H100 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, device in DEVICES.items():
        for format in BYTES:
            floor, aim = (step(device, format, apart=dict.fromkeys(TODAY, far)) for far in (1.0, 1.25))
            today = f"{step(device, format, apart=TODAY) * 1e3:.1f}" if (name, format) == ("h100", "bf16") else ""
            rate = TOKENS_A_STEP / aim
            lines.append(f"| {name} | {format} | {floor * 1e3:.1f} | {aim * 1e3:.1f} | {rate:,.0f} | {today} |")
    lines += [
        "",
        "| devices (H100, fp8) | ms a step, 1 row | 8 rows | MB sent a step, 1 row | share of it, 1 row |",
        "|---|---:|---:|---:|---:|",
    ]
    h100 = DEVICES["h100"]
    for devices in (1, 2, 4, 8, 16):
        one, eight = (step(h100, "fp8", devices, batch) * 1e3 for batch in (1, 8))
        sent, sending, waiting = traffic(h100, devices, 1)
        share = (sending + waiting) * 1e3 / one
        lines.append(f"| {devices} | {one:.1f} | {eight:.1f} | {sent / 1e6:.0f} | {share:.0%} |")
    lines += [
        "",
        "| rows (H100, fp8) | canvases, tokens a second | one after the other | $ a million | one after the other |",
        "|---|---:|---:|---:|---:|",
    ]
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        canvas, single = rates(h100, "fp8", 1, batch)
        cost = f"{dollars(h100, canvas):.2f} | {dollars(h100, single):.2f}"
        lines.append(f"| {batch} | {canvas:,.0f} | {single:,.0f} | {cost} |")
    turns = ", ".join(f"{name} {crossing(device, 'fp8')}" for name, device in DEVICES.items())
    return "\n".join([*lines, "", f"One token after the other gives more from so many rows on, fp8: {turns}."])


if __name__ == "__main__":
    print(tables())
