"""Tiny models with several stacks: encoder-decoders, and language models behind towers. Built from configs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf

from tests.models import Tiny


@dataclass(frozen=True)
class Stacks(Tiny):
    """A recipe.

    Attributes:
        stacks: Which stacks are scheduled; None is the default.
        quick: Whether the default suite tests it; the others are marked slow.
    """

    stacks: str | None = None
    quick: bool = False

    def batch(self, n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
        """One batch, ragged: inputs of 7 tokens and targets of 5, the last of them padded."""
        generator = torch.Generator().manual_seed(seed)
        return _BATCHES[self.kind](n, generator)


def _ids(n: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 60, (n, tokens), generator=generator)


def _targets(n: int, generator: torch.Generator) -> torch.Tensor:
    labels = _ids(n, 5, generator)
    labels[-1, 3:] = -100
    return labels


def _mask(n: int) -> torch.Tensor:
    mask = torch.ones(n, 7, dtype=torch.long)
    mask[-1, 5:] = 0
    return mask


def _seq2seq(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(n, 7, generator), "attention_mask": _mask(n), "labels": _targets(n, generator)}


def _speech(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(n, 8, 12, generator=generator), "labels": _targets(n, generator)}


def _frames(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(n, 12, 8, generator=generator), "labels": _targets(n, generator)}


_BATCHES = {"seq2seq": _seq2seq, "speech": _speech, "frames": _frames}
_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64, "max_position_embeddings": 16,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, **_TEXT,
}  # fmt: skip
_T5 = {
    "d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **_TEXT,
}  # fmt: skip
_SOUND = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}


def _bart_like(name: str, **kwargs) -> Stacks:
    config, model = getattr(tf, f"{name}Config"), getattr(tf, f"{name}ForConditionalGeneration", None)
    quick = kwargs.pop("quick", False)
    return Stacks(config, model or getattr(tf, f"{name}MTModel"), {**_BART, **kwargs}, "seq2seq", quick=quick)


ENCODER_DECODERS = {
    "bart": _bart_like("Bart", quick=True),
    "blenderbot": _bart_like("Blenderbot"),
    "blenderbot-small": _bart_like("BlenderbotSmall"),
    "m2m_100": _bart_like("M2M100", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "marian": _bart_like("Marian", decoder_vocab_size=64),
    "mbart": _bart_like("MBart"),
    "mvp": _bart_like("Mvp"),
    "pegasus": _bart_like("Pegasus"),
    "plbart": _bart_like("PLBart"),
    "speech_to_text": Stacks(
        tf.Speech2TextConfig, tf.Speech2TextForConditionalGeneration,
        {**_BART, **_SOUND, "input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16,
         "max_source_positions": 32},
        "frames",
    ),
    "whisper": Stacks(
        tf.WhisperConfig, tf.WhisperForConditionalGeneration, {**_BART, **_SOUND}, "speech", quick=True
    ),
}  # fmt: skip
T5S = {
    "t5": Stacks(tf.T5Config, tf.T5ForConditionalGeneration, _T5, "seq2seq", quick=True),
    "flan-t5": Stacks(
        tf.T5Config, tf.T5ForConditionalGeneration, {**_T5, "feed_forward_proj": "gated-gelu"}, "seq2seq"
    ),
    "mt5": Stacks(tf.MT5Config, tf.MT5ForConditionalGeneration, _T5, "seq2seq"),
    "switch_transformers": Stacks(
        tf.SwitchTransformersConfig,
        tf.SwitchTransformersForConditionalGeneration,
        {
            **_T5,
            "num_experts": 2,
            "expert_capacity": 64,
            "router_jitter_noise": 0.0,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_aux_loss_coef": 0.0,
            "router_z_loss_coef": 0.0,
        },
        "seq2seq",
    ),
    "umt5": Stacks(tf.UMT5Config, tf.UMT5ForConditionalGeneration, _T5, "seq2seq", quick=True),
}
# Language models behind towers: each sample is an image and text, in which `_IMAGE_TOKENS` stand for the image.
_IMAGE_TOKEN = 5
_LM = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
_QWEN_LM = {**_LM, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 1e4, "rope_type": "default"}}
_QWEN = {"image_token_id": _IMAGE_TOKEN, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def _prompt(n: int, generator: torch.Generator, image_tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(9, 60, (n, 9), generator=generator)
    ids[:, 1 : 1 + image_tokens] = _IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[-1, 7:] = 0
    labels = ids.masked_fill((ids == _IMAGE_TOKEN) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _images(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=generator)


def _pairs(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = _ids(n, 7, generator)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": _mask(n), "pixel_values": _images(n, generator), "return_loss": True}


def _patched(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Patches of all images in one row, as Qwen-VL has them."""
    pixels = torch.randn(n * 16, 3 * 2 * 4 * 4, generator=generator)
    prompt = _prompt(n, generator, 4)
    kinds = {"mm_token_type_ids": (prompt["input_ids"] == _IMAGE_TOKEN).int()}
    return {**prompt, **kinds, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _words(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """No image: towers do not run."""
    return _prompt(n, generator, 0)


def _tiles(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One image of one tile, which some blocks attend to from every token."""
    return {
        **_prompt(n, generator, 0),
        "pixel_values": _images(n, generator)[:, None, None],
        "aspect_ratio_ids": torch.ones(n, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(n, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(n, 9, 1, 1, dtype=torch.long),
    }


def _captions(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": _images(n, generator), "labels": _targets(n, generator)}


def _described(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = _ids(n, 7, generator)
    return {"input_ids": ids, "attention_mask": _mask(n), "pixel_values": _images(n, generator), "labels": ids}


def _typed(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    prompt = _prompt(n, generator, 4)
    kinds = {"token_type_ids": (prompt["input_ids"] == _IMAGE_TOKEN).long()}
    return {**prompt, **kinds, "pixel_values": _images(n, generator)}


def _sized(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    sizes = {"image_sizes": torch.tensor([[16, 16]] * n)}
    return {**_prompt(n, generator, 4), **sizes, "pixel_values": _images(n, generator)}


def _of_lists(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_prompt(n, generator, 1), "pixel_values": _images(n, generator)[:, None]}


def _with_one_token(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_prompt(n, generator, 1), "pixel_values": _images(n, generator)}


def _with_four_tokens(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_prompt(n, generator, 4), "pixel_values": _images(n, generator)}


_BATCHES |= {
    "pairs": _pairs, "patched": _patched, "typed": _typed, "sized": _sized, "lists": _of_lists,
    "one": _with_one_token, "four": _with_four_tokens, "words": _words, "tiles": _tiles, "captions": _captions,
    "described": _described,
}  # fmt: skip


def _vlm(name: str, kind: str, vision: dict, text: dict, stacks=None, quick=False, **kwargs) -> Stacks:
    config, model = getattr(tf, f"{name}Config"), getattr(tf, f"{name}ForConditionalGeneration")
    return Stacks(config, model, {"vision_config": vision, "text_config": text, **kwargs}, kind, stacks, quick)


def _of(model_type: str, sizes: dict) -> dict:
    return {"model_type": model_type, **sizes}


def _audio(name: str, **kwargs) -> Stacks:
    config, model = getattr(tf, f"{name}Config"), getattr(tf, f"{name}ForConditionalGeneration")
    of_audio = {"num_mel_bins": 8, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 40, "max_source_positions": 6, "hidden_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 40}  # fmt: skip
    family = {"Qwen2Audio": ("qwen2_audio_encoder", "qwen2"), "Voxtral": ("voxtral_encoder", "llama")}[name]
    configs = {"audio_config": _of(family[0], of_audio), "text_config": _of(family[1], _LM)}
    return Stacks(config, model, {**configs, **kwargs}, "words")


_LLAVA = (_of("clip_vision_model", _TOWER), _of("llama", _LM))
_QWEN_25 = ({**_QWEN_TOWER, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "window_size": 16,
             "fullatt_block_indexes": [1]}, _QWEN_LM)  # fmt: skip
VISION_LANGUAGE = {
    "llava": _vlm("Llava", "four", *_LLAVA, image_token_index=_IMAGE_TOKEN),
    "llava, both stacks": _vlm(
        "Llava", "four", *_LLAVA, stacks=["vision_tower", "language_model"], image_token_index=_IMAGE_TOKEN, quick=True
    ),
    "llava, tower": _vlm("Llava", "four", *_LLAVA, stacks="vision_tower", image_token_index=_IMAGE_TOKEN),
    "pixtral": _vlm(
        "Llava", "sized", _of("pixtral", _TOWER), _of("mistral", _LM), image_token_index=_IMAGE_TOKEN,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    ),
    "paligemma": _vlm(
        "PaliGemma", "typed", _of("siglip_vision_model", _TOWER), _of("gemma", _LM), image_token_index=_IMAGE_TOKEN,
        projection_dim=32,
    ),
    "gemma3": _vlm(
        "Gemma3", "typed", _of("siglip_vision_model", _TOWER), _LM, mm_tokens_per_image=4,
        image_token_index=_IMAGE_TOKEN,
    ),
    "idefics3": _vlm("Idefics3", "lists", _TOWER, _of("llama", _LM), image_token_id=_IMAGE_TOKEN, scale_factor=2),
    "smolvlm": _vlm("SmolVLM", "lists", _TOWER, _of("llama", _LM), image_token_id=_IMAGE_TOKEN, scale_factor=2),
    "internvl": _vlm("InternVL", "one", _TOWER, _of("qwen2", _LM), image_token_id=_IMAGE_TOKEN),
    "llava_next": _vlm("LlavaNext", "words", *_LLAVA, image_token_index=_IMAGE_TOKEN),
    "llava_onevision": _vlm(
        "LlavaOnevision", "words", _of("siglip_vision_model", _TOWER), _of("qwen2", _LM), image_token_index=_IMAGE_TOKEN
    ),
    "vipllava": _vlm("VipLlava", "words", *_LLAVA, image_token_index=_IMAGE_TOKEN, vision_feature_layers=[-1, -2]),
    "mistral3": _vlm(
        "Mistral3", "words", _of("pixtral", _TOWER), _of("mistral", _LM), image_token_index=_IMAGE_TOKEN
    ),
    "aya_vision": _vlm(
        "AyaVision", "words", _of("siglip_vision_model", _TOWER), _of("cohere2", _LM), image_token_index=_IMAGE_TOKEN
    ),
    "idefics2": _vlm(
        "Idefics2", "words", _TOWER, _of("mistral", _LM), image_token_id=_IMAGE_TOKEN,
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "num_key_value_heads": 1},
    ),
    "mllama": _vlm(
        "Mllama", "tiles",
        {"hidden_size": 24, "attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1, "image_size": 16,
         "intermediate_size": 40, "vision_output_dim": 48, "patch_size": 8, "intermediate_layers_indices": [0],
         "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        {**_LM, "cross_attention_layers": [1], "dropout": 0.0}, image_token_index=_IMAGE_TOKEN,
    ),
    "qwen2_audio": _audio("Qwen2Audio", audio_token_index=_IMAGE_TOKEN),
    "voxtral": _audio("Voxtral", audio_token_id=_IMAGE_TOKEN),
    "qwen2_vl": _vlm(
        "Qwen2VL", "patched", {**_QWEN_TOWER, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}, _QWEN_LM, **_QWEN
    ),
    "qwen2_5_vl": _vlm("Qwen2_5_VL", "patched", *_QWEN_25, **_QWEN),
    "qwen2_5_vl, both stacks": _vlm(
        "Qwen2_5_VL", "patched", *_QWEN_25, stacks=["visual", "language_model"], **_QWEN, quick=True
    ),
    "qwen3_vl": _vlm(
        "Qwen3VL", "patched",
        {**_QWEN_TOWER, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _QWEN_LM, **_QWEN,
    ),
    "qwen3_vl_moe": _vlm(
        "Qwen3VLMoe", "words",
        {**_QWEN_TOWER, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {**_QWEN_LM, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}, **_QWEN,
    ),
    "glm4v": _vlm(
        "Glm4v", "words",
        {**_QWEN_TOWER, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "image_size": 16}, _QWEN_LM,
        image_token_id=_IMAGE_TOKEN,
    ),
    "llama4": _vlm(
        "Llama4", "words",
        {**_TOWER, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24},
        {**_LM, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
        image_token_index=_IMAGE_TOKEN,
    ),
    "lfm2_vl": _vlm(
        "Lfm2Vl", "words", _of("siglip2_vision_model", {**_TOWER, "num_patches": 4}),
        _of("lfm2", {**_LM, "layer_types": ["full_attention"] * 3}), image_token_id=_IMAGE_TOKEN,
    ),
    "aria": _vlm(
        "Aria", "words", _of("idefics3_vision", _TOWER),
        {**_LM, "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}, image_token_index=_IMAGE_TOKEN,
    ),
    "video_llava": _vlm(
        "VideoLlava", "words", *_LLAVA, image_token_index=_IMAGE_TOKEN, video_token_index=6
    ),
    "got_ocr2": _vlm("GotOcr2", "words", _TOWER, _of("qwen2", _LM), image_token_index=_IMAGE_TOKEN),
}  # fmt: skip
_TEXT_TOWER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16,
}  # fmt: skip
_CLIP_LIKE = {"vision_config": _TOWER, "text_config": _TEXT_TOWER, "projection_dim": 16}
TOWERS = {
    "chinese_clip": Stacks(
        tf.ChineseCLIPConfig, tf.ChineseCLIPModel,
        {**_CLIP_LIKE, "text_config": {**_TEXT_TOWER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
        "pairs",
    ),
    "clipseg": Stacks(tf.CLIPSegConfig, tf.CLIPSegModel, _CLIP_LIKE, "pairs"),
    "owlv2": Stacks(tf.Owlv2Config, tf.Owlv2Model, _CLIP_LIKE, "pairs"),
    "owlvit": Stacks(tf.OwlViTConfig, tf.OwlViTModel, _CLIP_LIKE, "pairs"),
    "clip": Stacks(
        tf.CLIPConfig, tf.CLIPModel, _CLIP_LIKE, "pairs", quick=True,
    ),
    "siglip": Stacks(
        tf.SiglipConfig, tf.SiglipModel, {"vision_config": {**_TOWER, "hidden_size": 32}, "text_config": _TEXT_TOWER},
        "pairs",
    ),
}  # fmt: skip
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {"model_type": "bert", **_TEXT_TOWER, **_STILL}
_DECODES = {"is_decoder": True, "add_cross_attention": True}
_IDS = {"decoder_start_token_id": 1, "pad_token_id": 0}
# An encoder and a decoder of different makes, of which D2FT knows each: what the decoder reads of the other runs whole.
PAIRS = {
    "encoder-decoder (BERT, BERT)": Stacks(
        tf.EncoderDecoderConfig, tf.EncoderDecoderModel, {"encoder": _BERT, "decoder": {**_BERT, **_DECODES}, **_IDS},
        "seq2seq",
    ),
    "vision-encoder-decoder (ViT, BERT)": Stacks(
        tf.VisionEncoderDecoderConfig, tf.VisionEncoderDecoderModel,
        {"encoder": {"model_type": "vit", **_TOWER, **_STILL}, "decoder": {**_BERT, **_DECODES}, **_IDS}, "captions",
    ),
    "t5gemma": Stacks(
        tf.T5GemmaConfig, tf.T5GemmaForConditionalGeneration,
        {"encoder": _LM, "decoder": _LM, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "dropout_rate": 0.0, "tie_word_embeddings": False}, "seq2seq",
    ),
}  # fmt: skip
REFUSED = {
    "TrOCR (vision-encoder-decoder)": Stacks(
        tf.VisionEncoderDecoderConfig, tf.VisionEncoderDecoderModel,
        {"encoder": {"model_type": "vit", **_TOWER, **_STILL},
         "decoder": {"model_type": "trocr", "vocab_size": 64, "d_model": 32, "decoder_layers": 2,
                     "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 16,
                     "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
         **_IDS},
        "captions",
    ),
    "BLIP": Stacks(
        tf.BlipConfig, tf.BlipForConditionalGeneration,
        {"vision_config": {**_TOWER, "hidden_size": 32}, "projection_dim": 16,
         "text_config": {**_TEXT_TOWER, **_STILL, "encoder_hidden_size": 32}},
        "described",
    ),
    "GIT": Stacks(tf.GitConfig, tf.GitForCausalLM, {"vision_config": _TOWER, **_TEXT_TOWER, **_STILL}, "described"),
}  # fmt: skip
ZOO = {**PAIRS, **ENCODER_DECODERS, **T5S, **VISION_LANGUAGE, **TOWERS}
