"""Gemma 4's image tower: patches to soft tokens in the text model's space.

Pictures are of any sizes and never padded: their patches lie on one flat axis, and only attention goes picture by
picture. Source: the released checkpoint and transformers' models/gemma4.

Shapes: N = patches of all pictures, flat; n = patches of one; H heads; D head size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgemma.config import VisionConfig
from dgemma.model.layers import RMSNorm, gated, linear, rms_norm, rotate
from dgemma.picture import Picture

TOGETHER = 10_080
"""Patches that go through the tower at once; a picture of the largest budget has as many."""

Rotation = tuple[Tensor, Tensor]


class ClippedLinear(nn.Module):
    """A linear layer with the bounds that some releases of the tower store beside it."""

    def __init__(self, inputs: int, outputs: int, clipped: bool):
        super().__init__()
        self.clipped = clipped
        self.linear = nn.Linear(inputs, outputs, bias=False)
        for name in ("input_min", "input_max", "output_min", "output_max") if clipped else ():
            self.register_buffer(name, torch.tensor(float("inf" if name.endswith("max") else "-inf")))

    def forward(self, x: Tensor) -> Tensor:
        return self._bounded(linear(self._bounded(x, "input"), self.linear.weight), "output")

    def _bounded(self, x: Tensor, side: str) -> Tensor:
        return x.clamp(self.get_buffer(f"{side}_min"), self.get_buffer(f"{side}_max")) if self.clipped else x


class VisionAttention(nn.Module):
    """Every patch of a picture attends to all of them; queries, keys and values are normalised, the scale is 1."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, clipped = config.hidden_size, config.use_clipped_linears
        self.size, self.eps = config.head_dim, config.rms_norm_eps
        width = config.num_attention_heads * self.size
        self.q_proj = ClippedLinear(hidden, width, clipped)
        self.k_proj = ClippedLinear(hidden, width, clipped)
        self.v_proj = ClippedLinear(hidden, width, clipped)
        self.o_proj = ClippedLinear(width, hidden, clipped)
        self.q_norm = RMSNorm(self.size, self.eps)
        self.k_norm = RMSNorm(self.size, self.eps)

    def forward(self, x: Tensor, counts: list[int], turn: Rotation) -> Tensor:
        """x [N, hidden] to [N, hidden]; counts: patches of each picture."""
        q, k, v = (project(x).unflatten(-1, (-1, self.size)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate_in_plane(y, turn) for y in (self.q_norm(q), self.k_norm(k)))
        v = rms_norm(v, None, self.eps)
        outputs = []
        for parts in zip(*(y.split(counts) for y in (q, k, v)), strict=True):
            queries, keys, values = (part.transpose(0, 1)[None] for part in parts)
            one = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
            outputs.append(one[0].transpose(0, 1).flatten(1))
        return self.o_proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden, inner, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippedLinear(hidden, inner, clipped)
        self.up_proj = ClippedLinear(hidden, inner, clipped)
        self.down_proj = ClippedLinear(inner, hidden, clipped)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)  # noqa: E731
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, counts: list[int], turn: Rotation) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), counts, turn))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """A patch's pixels and its place, each through a table of its own for x and y."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.ones(2, config.position_embedding_size, config.hidden_size))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """patches uint8 [N, values], places int64 [N, 2] as (x, y), to [N, hidden]."""
        pixels = patches.float().div_(255).sub_(0.5).mul_(2).to(self.input_proj.weight.dtype)
        x, y = (F.embedding(at, table) for at, table in zip(places.T, self.position_embedding_table, strict=True))
        return linear(pixels, self.input_proj.weight) + (x + y)


class VisionTower(nn.Module):
    """Gemma 4's image encoder and the projection of its soft tokens into the text model."""

    def __init__(self, config: VisionConfig, text_hidden: int):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.embedding_projection = nn.Linear(config.hidden_size, text_hidden, bias=False)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The soft tokens [n / pooling², text hidden] of each picture; equal pictures are encoded once.

        ValueError for a picture whose patches do not fit the tower.
        """
        different = {picture.digest: picture for picture in pictures}
        found: dict[bytes, Tensor] = {}
        for some in _batches(list(different.items())):
            found |= zip((digest for digest, _ in some), self._encode([picture for _, picture in some]), strict=True)
        return [found[picture.digest] for picture in pictures]

    def _encode(self, pictures: list[Picture]) -> list[Tensor]:
        device = self.embedding_projection.weight.device
        patches = torch.from_numpy(np.concatenate([self._checked(picture) for picture in pictures])).to(device)
        places = torch.cat([_places(picture) for picture in pictures]).to(device)
        counts = [picture.rows * picture.columns for picture in pictures]
        turn = self._rotation(places)
        x = self.patch_embedder(patches, places)
        for layer in self.layers:
            x = layer(x, counts, turn)
        pooled = torch.cat([self._pool(part, picture) for part, picture in zip(x.split(counts), pictures, strict=True)])
        # The scale would leave float16's range.
        wide = pooled.float() * self.config.hidden_size**0.5
        if self.config.standardize:
            wide = (wide - self.std_bias.float()) * self.std_scale.float()
        soft = linear(rms_norm(wide.to(x.dtype), None, self.config.rms_norm_eps), self.embedding_projection.weight)
        return list(soft.split([count // self.config.pooling_kernel_size**2 for count in counts]))

    def _pool(self, x: Tensor, picture: Picture) -> Tensor:
        """Means [n / pooling², hidden] of neighbouring patches, in float32 and back."""
        k = self.config.pooling_kernel_size
        grid = x.float().view(picture.rows // k, k, picture.columns // k, k, -1)
        return grid.mean((1, 3)).flatten(0, 1).to(x.dtype)

    def _rotation(self, places: Tensor) -> Rotation:
        """cos and sin [N, 1, 2, D/4] of the angles of x and of y."""
        half = self.config.head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half
        angles = places[:, None, :, None].float() * (1.0 / self.config.rope_theta**exponents)
        dtype = self.embedding_projection.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _checked(self, picture: Picture) -> np.ndarray:
        """The picture's patches."""
        config, k, patches = self.config, self.config.pooling_kernel_size, picture.patches
        wanted = (picture.rows * picture.columns, 3 * config.patch_size**2)
        if patches.dtype != np.uint8 or patches.shape != wanted:
            told = f"{patches.dtype} {list(patches.shape)}"
            raise ValueError(f"a picture's patches are {told}; the tower reads uint8 {list(wanted)}")
        if picture.rows % k or picture.columns % k or not picture.rows * picture.columns:
            raise ValueError(f"a picture of {picture.rows} × {picture.columns} patches does not divide into {k} × {k}")
        if max(picture.rows, picture.columns) > config.position_embedding_size:
            have = config.position_embedding_size
            raise ValueError(f"a picture of {picture.rows} × {picture.columns} patches; the tower has {have} positions")
        return patches


def rotate_in_plane(x: Tensor, turn: Rotation) -> Tensor:
    """Turns the first half of each head of x [N, H, D] by x, the second by y (see `layers.rotate`)."""
    return rotate(x.unflatten(-1, (2, -1)), *turn).flatten(-2)


def _places(picture: Picture) -> Tensor:
    """int64 [n, 2]: (x, y) of each patch."""
    y, x = torch.meshgrid(torch.arange(picture.rows), torch.arange(picture.columns), indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def _batches(pictures: list[tuple[bytes, Picture]]) -> list[list[tuple[bytes, Picture]]]:
    """The pictures in groups of at most TOGETHER patches, or of one."""
    groups: list[list[tuple[bytes, Picture]]] = []
    filled = TOGETHER
    for digest, picture in pictures:
        count = picture.rows * picture.columns
        if filled + count > TOGETHER or not groups:
            groups.append([])
            filled = 0
        groups[-1].append((digest, picture))
        filled += count
    return groups
