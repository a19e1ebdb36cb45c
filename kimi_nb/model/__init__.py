"""Networks as functions of tensors; no files, no pandas."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    norm="""
        LayerNorm RMSNorm build_norm layer_norm rms_norm
    """,
    rope="""
        RotaryEmbedding apply_rope rope_frequencies to_half_split yarn_frequencies yarn_mscale
    """,
    kernels="""
        Attention AttentionError attend attention_logits call_flash_attn causal_mask eager_attention
        flash_attention flash_attn_package flash_provider flash_refusal fused_attention logit_maxima
    """,
    caches="""
        CacheError KVCache LatentCache LayerCaches MLACache TokenCache build_cache cache_bytes
        cache_bytes_per_token
    """,
    latent="""
        LatentAttention score_pairs
    """,
    attention="""
        MultiHeadAttention MultiHeadLatentAttention absorbing_pays build_attention kernel_name
        rope_dim
    """,
    parallel="""
        RanksError anywhere first_rank_first is_loss joined launched part_of rank_and_size
        share_folder total wait
    """,
    shard="""
        check_shard cut for_disk gather is_sharded part shard_ whole whole_parameters
    """,
    experts="""
        ACTIVATIONS DispatchPlan Experts FeedForward autocasting dispatch_plan expert_backend
        expert_counts is_gated padded_plan run_experts
    """,
    moe="""
        MoE Route RouterStats TopKGate group_limited_topk load_statistics max_violation
        scale_weights sequence_loss sigmoid_route softmax_route switch_loss update_biases
    """,
    network="""
        Block INIT_STD KimiModel ModelOutput attention_flops_per_token costs count_parameters
        forward_flops_per_token init_parameters measured_forward_flops_per_token parameter_generator
        training_flops_per_token
    """,
    decoder="""
        Decoder
    """,
)
