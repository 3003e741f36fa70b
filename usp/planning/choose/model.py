"""What a model is made of, as far as its memory and its time need to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A transformer of equal layers.

    Attributes:
        name: Of these numbers.
        layers, hidden, heads, kv_heads, mlp: L, h, H, G and the inner width f.
        head_dim, value_dim: D and Dv of a head; h / H unless given, and D.
        latent, rope: Numbers of a token that its keys and values are made of (MLA), the rotary ones
            among them; 0 where they are not.
        q_latent: Numbers that queries are made of; 0 is the hidden ones.
        experts, active: MLPs of a layer, and how many of them a token meets; 0 is one for all.
        vocabulary: Classes of the loss of each token; 0 where no token has one (a ViT).
        patch: Pixels of a side of a patch; 0 where tokens are words.
        gated: Whether the MLP has three matrices (SwiGLU) or two.
        causal: Whether its attention is.
        source: Where the numbers are from.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int = 0
    patch: int = 0
    gated: bool = True
    causal: bool = True
    source: str = ""
    head_dim: int = 0
    value_dim: int = 0
    latent: int = 0
    rope: int = 0
    q_latent: int = 0
    experts: int = 0
    active: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if (self.experts > 0) != (self.active > 0) or self.active > self.experts:
            raise ValueError(f"of experts {self.experts} a token meets active {self.active}")
        if self.rope > self.latent:
            raise ValueError(f"rope {self.rope} is among latent {self.latent}")
        if self.latent and self.kv_heads != self.heads:
            raise ValueError(f"latents make keys of kv_heads {self.kv_heads}, not of {self.heads}")
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def query(self) -> int:
        """Numbers of a token's queries, of all heads."""
        return self.heads * self.head_dim

    @property
    def result(self) -> int:
        """Numbers that attention finds for a token."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> int:
        """Numbers of a token that stand for its keys and values."""
        return self.latent or self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def inner(self) -> int:
        """Numbers of a token between the matrices of its MLPs."""
        return self.mlp * (self.active or 1)

    @property
    def opening(self) -> int:
        """Weights that make keys and values of latents."""
        dims = self.head_dim - self.rope + self.value_dim
        return (self.latent - self.rope) * self.heads * dims if self.latent else 0

    @property
    def attention_weights(self) -> int:
        """Of a layer's projections: q, k, v and out, and those behind latents."""
        query = self.hidden * self.query
        if self.q_latent:
            query = self.q_latent * (self.hidden + self.query)
        return query + self.hidden * (self.keys + self.result) + self.opening

    @property
    def expert_weights(self) -> int:
        """Of one MLP."""
        return (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def mlp_weights(self) -> int:
        """Of all MLPs of a layer, and of what chooses among them."""
        return (self.experts or 1) * self.expert_weights + self.experts * self.hidden

    @property
    def layer_weights(self) -> int:
        return self.attention_weights + self.mlp_weights

    @property
    def met_mlp_weights(self) -> int:
        """Those that a token meets."""
        return (self.active or 1) * self.expert_weights + self.experts * self.hidden

    @property
    def met_weights(self) -> int:
        """Of a layer, those that a token meets."""
        return self.attention_weights + self.met_mlp_weights

    @property
    def matrices(self) -> tuple[int, ...]:
        """Weights of the largest single tensors."""
        return self.vocabulary * self.hidden, (1 + self.gated) * self.hidden * self.mlp

    @property
    def front(self) -> int:
        """Weights in front of the layers: an embedding, or that of patches."""
        return self.vocabulary * self.hidden + 3 * self.patch**2 * self.hidden

    @property
    def ends(self) -> int:
        """Weights in front of the layers and behind them, which are a head."""
        return self.front + self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """P, without biases and norms."""
        return self.layers * self.layer_weights + self.ends

    @property
    def met(self) -> int:
        """Of P those that a token meets."""
        return self.layers * self.met_weights + self.ends


_ROPE = "arXiv:2307.09288"
_LLAMA3 = "arXiv:2407.21783"
_VIT = "arXiv:2010.11929"

MODELS = {
    model.name: model
    for model in (
        Model("llama2-7b", 32, 4096, 32, 32, 11008, 32000, source=_ROPE),
        Model("llama3-8b", 32, 4096, 32, 8, 14336, 128256, source=_LLAMA3),
        Model("llama3-70b", 80, 8192, 64, 8, 28672, 128256, source=_LLAMA3),
        Model("burst-14b", 40, 5120, 40, 40, 13824, 120000, source="BurstEngine, arXiv:2509.19836"),
        Model(
            "deepseek-v3",
            *(61, 7168, 128, 128, 2048, 129280),
            source="arXiv:2412.19437; its first three layers, which have no experts, as the others",
            head_dim=192,
            value_dim=128,
            latent=576,
            rope=64,
            q_latent=1536,
            experts=257,
            active=9,
        ),
        Model("vit-l", 24, 1024, 16, 16, 4096, 0, 16, gated=False, causal=False, source=_VIT),
        Model("vit-h", 32, 1280, 16, 16, 5120, 0, 14, gated=False, causal=False, source=_VIT),
        Model(
            "vit-22b",
            *(48, 6144, 48, 48, 24576, 0, 14),
            gated=False,
            causal=False,
            source="arXiv:2302.05442",
        ),
        Model(
            "vit-10b",
            *(48, 4096, 32, 32, 16384, 0, 16),
            gated=False,
            causal=False,
            source="shape assumed; the size is that of arXiv:2405.15780",
        ),
        Model(
            "dit-xl",
            *(28, 1152, 16, 16, 4608, 0, 2),
            gated=False,
            causal=False,
            source="arXiv:2212.09748",
        ),
    )
}
