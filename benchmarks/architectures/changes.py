"""Changes that make a configuration small: sizes by the name of a field, and changes for single families."""

from __future__ import annotations

from typing import Any

WIDTH, LAYERS, HEADS, LENGTH = 64, 2, 4, 512
EXPERTS: dict[str, float] = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
}
LATENT: dict[str, float] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_topk": LENGTH,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
"""Attention over a compressed cache, and what chooses the positions that it reads."""
STATES: dict[str, float] = {
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Recurrent layers: state spaces and linear attention."""
SIZES: dict[str, float] = {
    **EXPERTS,
    **LATENT,
    **STATES,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("emb_dim", "output_embedding_size", "input_embedding_size", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), HEADS // 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_size", "dim_head"), WIDTH // HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff"), 2 * WIDTH),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "dim_ff", "feed_forward_size", "mlp_dim"), 2 * WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LENGTH),
    **dict.fromkeys(("original_max_position_embeddings", "max_target_positions", "max_source_positions"), LENGTH),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 384),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    "attention_chunk_size": 16,
    "lm_head_multiplier": 0.7,
    "logits_scaling": 1.5,
    "logit_scale": 0.5,
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "logits_mup_width_multiplier": 2.0,
    "dim_model_base": 32,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "image_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
"""By the name of a field. What happens to logits is not left out by a factor of 1.
Windows are shorter than the rows that are written, so that tokens leave them."""

PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": LENGTH,
    "indexer_compress_ratio": 4,
}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # its class with a vision part has no cap
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": PERIODS,
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"num_hidden_layers": 4},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 48]},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""By family: fields whose defaults, or whose sizes above, do not fit together."""

NOT_TRIED = {
    "blt": "no small sizes were found for its parts that fit together",
    "cohere_compass_text": "transformers 5.17 cannot make it from its default configuration, and no other was found",
    "dbrx": "transformers 5.17 cannot make it from its default configuration, and no other was found",
    "gemma3n": "its vision part needs the package timm; `gemma3n_text` is in the tables",
    "gemma4_assistant": "a draft model, which reads the cache of another model",
    "gemma4_unified_assistant": "a draft model, which reads the cache of another model",
    "musicgen": "writes music; it needs the configurations of three other models",
    "musicgen_melody": "writes music; it needs the configurations of three other models",
}
"""By family: why no small model is made."""

CHOOSING_KEYS = ("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")
"""Families whose layers choose `index_topk` keys. With longer rows, sampler and trainer were found to differ."""
