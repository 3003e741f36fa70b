"""Models whose trunk is known: a line each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from usp.integrations._anemoi import of_grid
from usp.integrations._boundary import Boundary, Entries, Joint
from usp.integrations._recurrences import check_linear_layers

_MLP = "*.mlp"  # in most libraries
_OF_STREAMS = ("*.ff", "*.ff_context")  # of diffusers: of the image, and of a text beside it

# what layers of transformers' language models are given beside tokens
_OF_EXPERTS = Boundary(
    "layers", beside={"position_embeddings": 1, "position_ids": 1}, never=("cache",)
)
_ROTATED = replace(_OF_EXPERTS, mlp=_MLP)
# with layers of gated DeltaNet, whose convolution is called as a function, with its weight
_HYBRID = replace(
    _OF_EXPERTS,
    local="*.linear_attn.conv1d",
    beside=dict(_OF_EXPERTS.beside) | {"attention_mask": Entries(1, dims=2)},
    check=check_linear_layers,
)
# of images and of texts, each with a sequence of its own
_TOWERS = (
    Boundary("text_model.encoder.layers", mlp=_MLP),
    Boundary("vision_model.encoder.layers", mlp=_MLP),
)

# images of all sizes as one sequence, each or each window of one a document
_PACKED = Boundary(
    "blocks", dim=0, beside={"position_embeddings": 0}, documents="cu_seqlens", mlp=_MLP
)

# what it takes from inner layers it merges, four neighbours to a token
_STACKED = replace(_PACKED, reads="*deepstack_merger_list.*")

# these towers beside a text, whose tokens have three positions each and images among them
_OF_IMAGES_AND_TEXT = (_PACKED.under("visual."), _ROTATED.under("language_model."))

_QWEN_VL = "transformers.models.qwen"
_DIFFUSERS = "diffusers.models.transformers"
# a text that all ranks hold whole, looked at by a second attention
_TEXT = {"*.attn2": "encoder_hidden_states"}
# a text in front of the image, joined with it in attention and returned in front of it
_IN_FRONT = Joint("encoder_hidden_states")
_FLUX = Boundary(
    "transformer_blocks",
    "*.attn",
    then=("single_transformer_blocks",),
    joint=_IN_FRONT,
    beside={"image_rotary_emb": 0},
    mlp=_OF_STREAMS,
)


def _by_torchs_function(attention: nn.Module) -> dict[str, Any]:
    """MONAI's attention has a flag by which it calls torch's function, and its models have none;
    with it, weights are dropped in evaluation, too."""
    for name in ("rel_positional_embedding", "save_attn", "attention_dtype"):
        if getattr(attention, name, None):
            raise NotImplementedError(
                f"MONAI's {type(attention).__name__} has {name}, with which it computes attention "
                "by hand, among this rank's own tokens"
            )
    rate = attention.dropout_rate if attention.training else 0.0
    return {"use_flash_attention": True, "dropout_rate": rate}


def _without_prompts(prithvi: Any) -> None:
    if prithvi.vpt:
        raise NotImplementedError(
            f"{type(prithvi).__name__} puts {prithvi.vpt_n_tokens} prompts behind the first token "
            "of each rank, and takes as many away (vpt=True)"
        )


# by the class of the model, of what it derives from, or of the one part of it that is known
FAMILIES: dict[str, Boundary | tuple[Boundary, ...]] = {
    "torch.nn.modules.transformer.TransformerEncoder": Boundary("layers"),
    "torchvision.models.vision_transformer.VisionTransformer": Boundary("encoder.layers", mlp=_MLP),
    "timm.models.vision_transformer.VisionTransformer": Boundary("blocks", "*.attn", mlp=_MLP),
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": Boundary(
        "blocks", "*.attn", mlp=_MLP
    ),
    "timm.models.eva.Eva": Boundary(
        "blocks",
        "*.attn",
        beside={"rope": -2},
        after_prefix=("rope",),
        prefix_count="num_prefix_tokens",
        mlp=_MLP,
    ),
    "timm.models.beit.Beit": Boundary("blocks", "*.attn", mlp=_MLP),
    "anemoi.models.layers.processor.TransformerProcessor": Boundary(
        "proc",
        "*.attention",
        dim=0,
        beside={"cond": 0},
        never=("model_comm_group",),
        attributes=of_grid,
        mlp=_MLP,
    ),
    "physicsnemo.models.dit.dit.DiT": Boundary("blocks", "*.attention"),
    "terratorch.models.backbones.prithvi_mae.PrithviViT": Boundary(
        "blocks", "*.attn", check=_without_prompts, states=True, mlp=_MLP
    ),
    "monai.networks.nets.vit.ViT": Boundary(
        "blocks", "*.attn", attributes=_by_torchs_function, states=True, mlp=_MLP
    ),
    "transformers.models.vit.modeling_vit.ViTModel": Boundary("layers", mlp=_MLP),
    "transformers.models.clip.modeling_clip.CLIPEncoder": Boundary("layers", mlp=_MLP),
    "transformers.models.clip.modeling_clip.CLIPModel": _TOWERS,
    "transformers.models.siglip.modeling_siglip.SiglipEncoder": Boundary("layers", mlp=_MLP),
    "transformers.models.siglip.modeling_siglip.SiglipModel": _TOWERS,
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTEncoder": Boundary(
        "layer",
        beside={"position_embeddings": -2},
        after_prefix=("position_embeddings",),
        mlp=_MLP,
    ),
    f"{_QWEN_VL}2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel": _PACKED,
    f"{_QWEN_VL}2_vl.modeling_qwen2_vl.Qwen2VLTextModel": _ROTATED,
    f"{_QWEN_VL}2_vl.modeling_qwen2_vl.Qwen2VLModel": _OF_IMAGES_AND_TEXT,
    f"{_QWEN_VL}2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": _PACKED,
    f"{_QWEN_VL}2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel": _ROTATED,
    f"{_QWEN_VL}2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel": _OF_IMAGES_AND_TEXT,
    # its text adds what the tower merges between its layers, to the tokens of the whole
    f"{_QWEN_VL}3_vl.modeling_qwen3_vl.Qwen3VLVisionModel": _STACKED,
    f"{_QWEN_VL}3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel": _STACKED,
    "transformers.models.bert.modeling_bert.BertEncoder": Boundary("layer", never=("cache",)),
    "transformers.models.llama.modeling_llama.LlamaModel": _ROTATED,
    "transformers.models.qwen3.modeling_qwen3.Qwen3Model": _ROTATED,
    "transformers.models.gemma2.modeling_gemma2.Gemma2Model": _ROTATED,
    "transformers.models.gemma3.modeling_gemma3.Gemma3TextModel": _ROTATED,
    "transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2Model": _ROTATED,
    "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Model": _ROTATED,
    "transformers.models.glm4_moe_lite.modeling_glm4_moe_lite.Glm4MoeLiteModel": _ROTATED,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssModel": _OF_EXPERTS,
    "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextModel": _HYBRID,
    "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5TextModel": replace(_HYBRID, mlp=_MLP),
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeTextModel": _HYBRID,
    f"{_DIFFUSERS}.dit_transformer_2d.DiTTransformer2DModel": Boundary(
        "transformer_blocks", "*.attn1", mlp=_OF_STREAMS
    ),
    # of UNets, which hold several: each has a trunk of its own
    f"{_DIFFUSERS}.transformer_2d.Transformer2DModel": Boundary(
        "transformer_blocks",
        "*.attn1",
        whole=_TEXT | {"*.attn1": "encoder_hidden_states"},  # where it has no other
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.pixart_transformer_2d.PixArtTransformer2DModel": Boundary(
        "transformer_blocks", "*.attn1", whole=_TEXT, mlp=_OF_STREAMS
    ),
    f"{_DIFFUSERS}.stable_audio_transformer.StableAudioDiTModel": Boundary(
        "transformer_blocks",
        "*.attn1",
        whole=_TEXT,
        beside={"rotary_embedding": 0},
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.transformer_wan.WanTransformer3DModel": Boundary(
        "blocks",
        "*.attn1",
        whole=_TEXT,
        beside={"rotary_emb": 1, "temb": Entries(1, dims=4)},
        mlp="*.ffn",
    ),
    f"{_DIFFUSERS}.transformer_ltx.LTXVideoTransformer3DModel": Boundary(
        "transformer_blocks",
        "*.attn1",
        whole=_TEXT,
        beside={"image_rotary_emb": 1, "temb": Entries(1, one=True)},
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.transformer_flux.FluxTransformer2DModel": _FLUX,
    f"{_DIFFUSERS}.transformer_flux2.Flux2Transformer2DModel": _FLUX,
    f"{_DIFFUSERS}.transformer_sd3.SD3Transformer2DModel": Boundary(
        "transformer_blocks",
        "*.attn",
        joint=Joint("encoder_hidden_states", behind=True, alone="*.attn2"),
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.cogvideox_transformer_3d.CogVideoXTransformer3DModel": Boundary(
        "transformer_blocks",
        "*.attn1",
        joint=Joint("encoder_hidden_states", returned=1),
        beside={"image_rotary_emb": Entries(0, "hidden_states")},
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel": Boundary(
        "transformer_blocks",
        "*.attn",
        then=("single_transformer_blocks",),
        joint=Joint("encoder_hidden_states", behind=True, returned=1, each=True),
        beside={
            "freqs_cis": Entries(0, "hidden_states"),
            "image_rotary_emb": Entries(0, "hidden_states"),
            "attention_mask": -1,
        },
        never=("token_replace_emb",),
        mlp=_OF_STREAMS,
    ),
    f"{_DIFFUSERS}.transformer_qwenimage.QwenImageTransformer2DModel": Boundary(
        "transformer_blocks",
        "*.attn",
        joint=Joint("encoder_hidden_states", each=True),
        beside={
            "image_rotary_emb": (
                Entries(0, "hidden_states"),
                Entries(0, "encoder_hidden_states"),
            ),
            "encoder_hidden_states_mask": Entries(1, "encoder_hidden_states"),
            "modulate_index": Entries(1, "hidden_states"),
        },
        mlp=("*.img_mlp", "*.txt_mlp"),
    ),
}


def family(model: nn.Module) -> tuple[Boundary, ...]:
    """The trunks of a model that is known, or of the parts of it that are, if these are of a kind.

    Raises:
        ValueError: none is, or several of several kinds are.
    """
    known = known_parts(model)
    if known:
        first, *others = (_known(model.get_submodule(name)) for name in known)
        if all(other == first for other in others):
            return tuple(each for found in known.values() for each in found)
        names = [each.trunk for found in known.values() for each in found]
        raise ValueError(
            f"{type(model).__qualname__} holds several parts whose trunk is known: say which are "
            f"spread, trunk={names}"
        )
    raise ValueError(
        f"the trunk of {type(model).__qualname__} is not known: name the modules that follow each "
        'other, and between which tokens are spread, trunk="encoder.layers", or describe it, '
        "trunk=usp.Boundary(...)"
    )


def known_parts(model: nn.Module) -> dict[str, tuple[Boundary, ...]]:
    """The trunks of each part of a model that is known, by the name of the part."""
    known: dict[str, tuple[Boundary, ...]] = {}
    for name, module in model.named_modules():
        found = _known(module)
        if found and not any(not n or name.startswith(f"{n}.") for n in known):
            prefix = f"{name}." if name else ""
            known[name] = tuple(each.under(prefix) for each in found)
    return known


def _known(module: nn.Module) -> tuple[Boundary, ...]:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    found = next((FAMILIES[name] for name in names if name in FAMILIES), ())
    return (found,) if isinstance(found, Boundary) else found
