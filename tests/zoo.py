"""Tiny models of many families, found from their structure, with a batch for each. Built from configs: nothing is
downloaded. `tests/models.py` has the few that every execution test runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf

from tests.models import Tiny


_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT = {
    **_HEADS, **_STILL, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 5,
    "max_position_embeddings": 32,
}  # fmt: skip
_IMAGE = {**_HEADS, **_STILL, "image_size": 16, "patch_size": 8, "num_labels": 5}
_SPEECH = {
    **_HEADS, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "mask_time_prob": 0.0, "num_labels": 5, "classifier_proj_size": 16, "vocab_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Animal(Tiny):
    """A recipe of the zoo.

    Attributes:
        group: ``"text encoders"``, ``"vision"``, ``"speech"`` or ``"decoders"``: where the family stands in
            docs/architectures.md.
        family: Its name there.
        quick: Whether the default suite tests it; the others are marked slow.
        refused: Words of the reason why it is not cut into heads, if it is not.
    """

    group: str = "text encoders"
    family: str = ""
    quick: bool = False
    refused: str = ""

    def batch(self, n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
        """One batch of what the model takes; labels where it has a task head."""
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(n, *shape, generator=generator)

        inputs = {
            "tokens": lambda: {
                "input_ids": torch.randint(3, 60, (n, 7), generator=generator),
                "attention_mask": (torch.arange(7) < torch.tensor([7] * (n - 1) + [5])[:, None]).long(),
            },
            "boxes": lambda: {
                "input_ids": torch.randint(3, 60, (n, 7), generator=generator),
                "bbox": torch.randint(0, 8, (n, 7, 4), generator=generator).sort(-1)[0],
            },
            "both": lambda: {
                "input_ids": torch.randint(3, 60, (n, 7), generator=generator),
                "pixel_values": values(3, 16, 16),
                "pixel_mask": torch.ones(n, 16, 16, dtype=torch.long),
            },
            "image": lambda: {"pixel_values": values(3, 16, 16)},
            "large image": lambda: {"pixel_values": values(3, 32, 32)},
            "video": lambda: {"pixel_values": values(4, 3, 16, 16)},
            "patches": lambda: {
                "pixel_values": values(4, 192),
                "pixel_attention_mask": torch.ones(n, 4, dtype=torch.long),
                "spatial_shapes": torch.tensor([[2, 2]] * n),
            },
            "packed": lambda: {
                "pixel_values": values(16, 96).flatten(0, 1),
                "grid_thw": torch.tensor([[1, 4, 4]] * n),
            },
            "wave": lambda: {"input_values": values(60)},
            "spectrogram": lambda: {"input_values": values(16, 8)},
            "mel": lambda: {"input_features": values(8, 12)},
            "frames": lambda: {"input_features": values(12, 8)},
        }[self.kind]()
        if "num_labels" in self.kwargs:
            inputs["labels"] = torch.randint(5, (n,), generator=generator)
        return inputs


def _text(config, model, family, **kwargs) -> Animal:
    marks = _marks(kwargs)
    return Animal(config, model, {**_TEXT, **kwargs}, "tokens", "text encoders", family, **marks)


def _lm(name, family, refused, **kwargs) -> Animal:
    config, model = getattr(tf, f"{name}Config"), getattr(tf, f"{name}Model")
    known = {**_HEADS, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Animal(config, model, {**known, **kwargs}, "tokens", "decoders", family, refused=refused)


def _image(config, model, family, kind="image", **kwargs) -> Animal:
    marks = _marks(kwargs)
    return Animal(config, model, {**_IMAGE, **kwargs}, kind, "vision", family, **marks)


def _speech(config, model, family, kind="wave", **kwargs) -> Animal:
    marks = _marks(kwargs)
    base = _SPEECH if kind == "wave" else {}
    return Animal(config, model, {**base, **kwargs}, kind, "speech", family, **marks)


def _marks(kwargs: dict) -> dict:
    return {name: kwargs.pop(name) for name in ("quick", "refused") if name in kwargs}


_NO_LABELS = {"num_labels": 5}

ZOO: dict[str, Animal] = {
    "roberta": _text(tf.RobertaConfig, tf.RobertaForSequenceClassification, "RoBERTa"),
    "xlm-roberta": _text(tf.XLMRobertaConfig, tf.XLMRobertaForSequenceClassification, "XLM-RoBERTa"),
    "xlm-roberta-xl": _text(tf.XLMRobertaXLConfig, tf.XLMRobertaXLForSequenceClassification, "XLM-RoBERTa-XL"),
    "roberta-prelayernorm": _text(
        tf.RobertaPreLayerNormConfig, tf.RobertaPreLayerNormForSequenceClassification, "RoBERTa-PreLayerNorm"
    ),
    "camembert": _text(tf.CamembertConfig, tf.CamembertForSequenceClassification, "CamemBERT"),
    "electra": _text(
        tf.ElectraConfig, tf.ElectraForSequenceClassification, "ELECTRA", embedding_size=16
    ),
    "distilbert": _text(
        tf.DistilBertConfig, tf.DistilBertForSequenceClassification, "DistilBERT", quick=True,
        dim=32, n_heads=4, hidden_dim=48, n_layers=2, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "mpnet": _text(tf.MPNetConfig, tf.MPNetForSequenceClassification, "MPNet", quick=True),
    "deberta": _text(
        tf.DebertaConfig, tf.DebertaForSequenceClassification, "DeBERTa", relative_attention=True, quick=True,
        pos_att_type=["c2p", "p2c"], pooler_hidden_size=32,
    ),
    "deberta-v2": _text(
        tf.DebertaV2Config, tf.DebertaV2ForSequenceClassification, "DeBERTa-v2", relative_attention=True,
        pos_att_type=["c2p", "p2c"], pooler_hidden_size=32, quick=True,
    ),
    "deberta-v3": _text(
        tf.DebertaV2Config, tf.DebertaV2ForSequenceClassification, "DeBERTa-v3", relative_attention=True,
        pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm",
        pooler_hidden_size=32,
    ),
    "albert": _text(
        tf.AlbertConfig, tf.AlbertForSequenceClassification, "ALBERT", embedding_size=16, refused="share their weights"
    ),
    "modernbert": _text(
        tf.ModernBertConfig, tf.ModernBertForSequenceClassification, "ModernBERT", quick=True, cls_token_id=1,
        sep_token_id=2,
    ),
    "modernbert-decoder": _text(
        tf.ModernBertDecoderConfig, tf.ModernBertDecoderForSequenceClassification, "ModernBERT, decoder",
        cls_token_id=1, sep_token_id=2,
    ),
    "gte": _text(tf.GteConfig, tf.GteForSequenceClassification, "GTE"),
    "luke": _text(tf.LukeConfig, tf.LukeForSequenceClassification, "LUKE", entity_vocab_size=8, entity_emb_size=8),
    "markuplm": _text(tf.MarkupLMConfig, tf.MarkupLMForSequenceClassification, "MarkupLM"),
    "bert-generation": _text(tf.BertGenerationConfig, tf.BertGenerationEncoder, "BERT, generation"),
    "esm": _text(tf.EsmConfig, tf.EsmForSequenceClassification, "ESM", position_embedding_type="rotary"),
    "nomic_bert": _text(
        tf.NomicBertConfig, tf.NomicBertForSequenceClassification, "NomicBERT", head_dim=8
    ),
    "jina_embeddings_v3": _text(
        tf.JinaEmbeddingsV3Config, tf.JinaEmbeddingsV3ForSequenceClassification, "Jina embeddings v3"
    ),
    "mobilebert": _text(
        tf.MobileBertConfig, tf.MobileBertForSequenceClassification, "MobileBERT", embedding_size=32,
        intra_bottleneck_size=16, quick=True,
    ),
    "layoutlm": _text(tf.LayoutLMConfig, tf.LayoutLMForSequenceClassification, "LayoutLM"),
    "data2vec-text": _text(tf.Data2VecTextConfig, tf.Data2VecTextForSequenceClassification, "Data2Vec, text"),
    "ernie": _text(tf.ErnieConfig, tf.ErnieForSequenceClassification, "ERNIE"),
    "megatron-bert": _text(tf.MegatronBertConfig, tf.MegatronBertForSequenceClassification, "Megatron-BERT"),
    "rembert": _text(tf.RemBertConfig, tf.RemBertForSequenceClassification, "RemBERT"),
    "roformer": _text(tf.RoFormerConfig, tf.RoFormerForSequenceClassification, "RoFormer"),
    "xmod": _text(tf.XmodConfig, tf.XmodForSequenceClassification, "X-MOD", default_language="en_XX"),
    "squeezebert": _text(
        tf.SqueezeBertConfig, tf.SqueezeBertForSequenceClassification, "SqueezeBERT", embedding_size=32,
        refused="convolutions",
    ),
    "big_bird": _text(tf.BigBirdConfig, tf.BigBirdForSequenceClassification, "BigBird", refused="sparse attention"),
    "longformer": _text(
        tf.LongformerConfig, tf.LongformerForSequenceClassification, "Longformer", refused="global tokens"
    ),
    "layoutlmv3": Animal(
        tf.LayoutLMv3Config, tf.LayoutLMv3ForSequenceClassification,
        {**_TEXT, "visual_embed": False, "coordinate_size": 5, "shape_size": 6, "max_2d_position_embeddings": 64,
         "has_relative_attention_bias": True, "has_spatial_attention_bias": True},
        "boxes", "text encoders", "LayoutLMv3", quick=True,
    ),
    "bros": Animal(
        tf.BrosConfig, tf.BrosModel, {**_TEXT, "hidden_size": 64}, "boxes",
        "text encoders", "BROS",
    ),
    "eurobert": _text(tf.EuroBertConfig, tf.EuroBertForSequenceClassification, "EuroBERT", num_key_value_heads=2),
    "splinter": Animal(tf.SplinterConfig, tf.SplinterModel, _TEXT, "tokens", "text encoders", "Splinter"),
    "tapas": Animal(
        tf.TapasConfig, tf.TapasModel, {**_TEXT, "type_vocab_sizes": [2] * 7}, "tokens", "text encoders", "TAPAS",
    ),
    "roc_bert": _text(
        tf.RoCBertConfig, tf.RoCBertForSequenceClassification, "RoCBERT", pronunciation_vocab_size=64,
        shape_vocab_size=64, pronunciation_embed_dim=8, shape_embed_dim=8,
    ),
    "xlm": Animal(
        tf.XLMConfig, tf.XLMModel, {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.0,
        "attention_dropout": 0.0}, "tokens", "text encoders", "XLM", refused="lists of their own",
    ),
    "flaubert": Animal(
        tf.FlaubertConfig, tf.FlaubertModel, {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4,
        "dropout": 0.0, "attention_dropout": 0.0}, "tokens", "text encoders", "FlauBERT", refused="lists of their own",
    ),
    "xlnet": Animal(
        tf.XLNetConfig, tf.XLNetModel, {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
        "dropout": 0.0}, "tokens", "text encoders", "XLNet", refused="parameters of all heads",
    ),
    "funnel": Animal(
        tf.FunnelConfig, tf.FunnelModel, {"vocab_size": 64, "d_model": 32, "block_sizes": [1, 1], "n_head": 4,
        "d_head": 8, "d_inner": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
        "tokens", "text encoders", "Funnel", refused="parameters of all heads",
    ),
    "fnet": _text(tf.FNetConfig, tf.FNetForSequenceClassification, "FNet", refused="Fourier"),
    "convbert": _text(
        tf.ConvBertConfig, tf.ConvBertForSequenceClassification, "ConvBERT", embedding_size=32, head_ratio=2,
        refused="beside a convolution",
    ),
    "ibert": _text(tf.IBertConfig, tf.IBertForSequenceClassification, "I-BERT", refused="quantized activations"),
    "lilt": Animal(
        tf.LiltConfig, tf.LiltForSequenceClassification, {**_TEXT, "hidden_size": 48, "channel_shrink_ratio": 2},
        "boxes", "text encoders", "LiLT", refused="second stream",
    ),
    "nystromformer": _text(
        tf.NystromformerConfig, tf.NystromformerForSequenceClassification, "Nystromformer", num_landmarks=7,
        segment_means_seq_len=7, refused="convolution of its own",
    ),
    "clip_text_model": _text(tf.CLIPTextConfig, tf.CLIPTextModel, "CLIP, text tower"),
    "siglip_text_model": _text(tf.SiglipTextConfig, tf.SiglipTextModel, "SigLIP, text tower"),
    "deit": _image(tf.DeiTConfig, tf.DeiTForImageClassification, "DeiT"),
    "dinov2": _image(tf.Dinov2Config, tf.Dinov2ForImageClassification, "DINOv2", use_swiglu_ffn=True),
    "dinov2_with_registers": _image(
        tf.Dinov2WithRegistersConfig, tf.Dinov2WithRegistersForImageClassification, "DINOv2 with registers"
    ),
    "dinov3_vit": _image(
        tf.DINOv3ViTConfig, tf.DINOv3ViTModel, "DINOv3", quick=True, use_gated_mlp=True, num_register_tokens=2
    ),
    "clip_vision_model": _image(tf.CLIPVisionConfig, tf.CLIPVisionModel, "CLIP, vision tower"),
    "siglip_vision_model": _image(tf.SiglipVisionConfig, tf.SiglipVisionModel, "SigLIP, vision tower", quick=True),
    "siglip2_vision_model": _image(
        tf.Siglip2VisionConfig, tf.Siglip2VisionModel, "SigLIP 2, vision tower", "patches", num_patches=4
    ),
    "beit": _image(
        tf.BeitConfig, tf.BeitForImageClassification, "BEiT", quick=True, use_relative_position_bias=True,
        layer_scale_init_value=0.5,
    ),
    "data2vec-vision": _image(
        tf.Data2VecVisionConfig, tf.Data2VecVisionForImageClassification, "Data2Vec, vision",
        use_shared_relative_position_bias=True,
    ),
    "vit_mae": _image(tf.ViTMAEConfig, tf.ViTMAEModel, "ViT-MAE", mask_ratio=0.0),
    "vit_msn": _image(tf.ViTMSNConfig, tf.ViTMSNForImageClassification, "ViT-MSN"),
    "ijepa": _image(tf.IJepaConfig, tf.IJepaForImageClassification, "I-JEPA"),
    "vivit": _image(
        tf.VivitConfig, tf.VivitForVideoClassification, "ViViT", "video", num_frames=4, tubelet_size=[2, 8, 8]
    ),
    "videomae": _image(
        tf.VideoMAEConfig, tf.VideoMAEForVideoClassification, "VideoMAE", "video", num_frames=4, tubelet_size=2
    ),
    "dpt": _image(
        tf.DPTConfig, tf.DPTModel, "DPT", is_hybrid=False, backbone_out_indices=[0, 1], neck_hidden_sizes=[8, 8],
    ),
    "vilt": Animal(
        tf.ViltConfig, tf.ViltModel, {**_TEXT, **_IMAGE, "type_vocab_size": 2}, "both", "vision", "ViLT",
    ),
    "yolos": _image(tf.YolosConfig, tf.YolosModel, "YOLOS", image_size=[16, 16], num_detection_tokens=2),
    "llama4_vision_model": _image(
        tf.Llama4VisionConfig, tf.Llama4VisionModel, "Llama 4, vision tower", quick=True, intermediate_size=128,
        projector_input_dim=32, projector_output_dim=32, vision_output_dim=32, patch_size=4,
    ),
    "muse_glimmer_vision": _image(
        tf.MuseGlimmerVisionConfig, tf.MuseGlimmerVisionModel, "Muse Glimmer, vision tower", "packed", patch_size=4,
        pos_emb_height=4, pos_emb_width=4,
    ),
    "swin": Animal(
        tf.SwinConfig, tf.SwinForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2,
         "num_labels": 5, "drop_path_rate": 0.0},
        "image", "vision", "Swin", refused="per head",
    ),
    "hiera": _image(
        tf.HieraConfig, tf.HieraForImageClassification, "Hiera", "large image", drop_path_rate=0.0,
        refused="from stage to stage", image_size=[32, 32],
        patch_size=[7, 7], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8],
    ),
    "convnext": Animal(
        tf.ConvNextConfig, tf.ConvNextForImageClassification,
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5}, "image",
        "vision", "ConvNeXt", refused="no attention",
    ),
    "convnextv2": Animal(
        tf.ConvNextV2Config, tf.ConvNextV2ForImageClassification,
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5}, "image",
        "vision", "ConvNeXt V2", refused="no attention",
    ),
    "resnet": Animal(
        tf.ResNetConfig, tf.ResNetForImageClassification,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 5},
        "image", "vision", "ResNet", refused="no attention",
    ),
    "swinv2": Animal(
        tf.Swinv2Config, tf.Swinv2ForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2,
         "num_labels": 5, "drop_path_rate": 0.0},
        "image", "vision", "Swin V2", refused="per head",
    ),
    "segformer": Animal(
        tf.SegformerConfig, tf.SegformerForImageClassification,
        {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "num_labels": 5,
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
         "drop_path_rate": 0.0, **_STILL, "classifier_dropout_prob": 0.0},
        "image", "vision", "SegFormer", refused="from stage to stage",
    ),
    "pvt_v2": Animal(
        tf.PvtV2Config, tf.PvtV2ForImageClassification,
        {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
         "num_labels": 5, "drop_path_rate": 0.0, **_STILL},
        "image", "vision", "PVT v2", refused="from stage to stage",
    ),
    "audio-spectrogram-transformer": _speech(
        tf.ASTConfig, tf.ASTForAudioClassification, "AST", "spectrogram", **_HEADS, **_STILL, **_NO_LABELS,
        num_mel_bins=8, max_length=16, patch_size=4, frequency_stride=4, time_stride=4,
    ),
    "wav2vec2": _speech(tf.Wav2Vec2Config, tf.Wav2Vec2ForSequenceClassification, "Wav2Vec2", quick=True),
    "hubert": _speech(tf.HubertConfig, tf.HubertForSequenceClassification, "HuBERT"),
    "sew": _speech(
        tf.SEWConfig, tf.SEWForSequenceClassification, "SEW", squeeze_factor=2, num_conv_pos_embeddings=4,
    ),
    "unispeech": _speech(tf.UniSpeechConfig, tf.UniSpeechForSequenceClassification, "UniSpeech"),
    "unispeech-sat": _speech(tf.UniSpeechSatConfig, tf.UniSpeechSatForSequenceClassification, "UniSpeech-SAT"),
    "data2vec-audio": _speech(tf.Data2VecAudioConfig, tf.Data2VecAudioForSequenceClassification, "Data2Vec, audio"),
    "wavlm": _speech(tf.WavLMConfig, tf.WavLMForSequenceClassification, "WavLM", refused="instead of calling"),
    "wav2vec2-conformer": _speech(
        tf.Wav2Vec2ConformerConfig, tf.Wav2Vec2ConformerForSequenceClassification, "Wav2Vec2-Conformer",
        conformer_conv_dropout=0.0, conv_depthwise_kernel_size=3, refused="two feed-forward networks",
    ),
    "wav2vec2-bert": _speech(
        tf.Wav2Vec2BertConfig, tf.Wav2Vec2BertModel, "Wav2Vec2-BERT", "frames", **_HEADS, conformer_conv_dropout=0.0,
        feature_projection_input_dim=8, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, conv_depthwise_kernel_size=3,
        refused="two feed-forward networks",
    ),
    "whisper": _speech(
        tf.WhisperConfig, tf.WhisperForAudioClassification, "Whisper, encoder", "mel", quick=True, **_NO_LABELS,
        vocab_size=64, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=6, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, classifier_proj_size=16, dropout=0.0,
    ),
    "bitnet": _lm("BitNet", "bitnet", "features of all heads together", num_key_value_heads=2),
    "diffllama": _lm("DiffLlama", "diffllama", "one half of its heads", num_key_value_heads=2),
    "falcon_h1": _lm(
        "FalconH1", "falcon_h1", "side by side", num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    ),
    "mamba": _lm("Mamba", "mamba", "a recurrence over channels", state_size=4),
    "mamba2": _lm(
        "Mamba2", "mamba2", "a recurrence over channels", state_size=4, num_heads=8, head_dim=8, n_groups=1, expand=2,
        chunk_size=4,
    ),
    "rwkv": _lm("Rwkv", "rwkv", "a recurrence over channels", attention_hidden_size=32, context_length=16),
    "openai-gpt": Animal(
        tf.OpenAIGPTConfig, tf.OpenAIGPTModel, {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2,
        "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "tokens", "decoders", "openai-gpt",
        refused="returns a list",
    ),
    "recurrent_gemma": _lm(
        "RecurrentGemma", "recurrent_gemma", "attention or a recurrence", num_key_value_heads=2, lru_width=32,
        num_hidden_layers=3, attention_window_size=8,
    ),
}  # fmt: skip
