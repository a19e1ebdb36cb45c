"""Networks as functions of tensors; no files, no pandas."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    precision="""
        autocasting widened
    """,
    layernorm="""
        LayerNorm layer_norm
    """,
    rmsnorm="""
        RMSNorm rms_norm
    """,
    norm="""
        NORMS build_norm
    """,
    rope="""
        RotaryEmbedding apply_rope position_words rope_frequencies to_half_split turn_
        yarn_frequencies yarn_mscale
    """,
    kernels="""
        Attention AttentionError FlashPackage attend attention_logits call_flash_attn causal_mask
        eager_attention flash_attention flash_attn_package flash_provider flash_refusal
        fused_attention kernel_words logit_maxima
    """,
    caches="""
        CacheError LayerCaches TokenCache
    """,
    mha="""
        KVCache MultiHeadAttention scale_heads_
    """,
    mla="""
        MLACache MultiHeadLatentAttention absorbing_pays
    """,
    latent="""
        LatentAttention LatentCache latent_pairs
    """,
    delta="""
        CHUNK StateCache counted_flops decay_floor decayed_products delta_chunked delta_flops
        delta_recurrent delta_step in_chunks leaf_size short_conv unit_length
    """,
    kda="""
        ForgetGate KimiDeltaAttention ShortConvolution decay_rates first_rates first_steps
        fla_package linear_sizes
    """,
    gdn="""
        GatedDeltaNet HeadGate
    """,
    rows="""
        rows_by_head rows_of_latent
    """,
    attention="""
        ATTENTIONS attention_flops_per_token attention_of attention_words attentions_of
        build_attention build_cache cache_bytes cache_bytes_per_token kernel_name leaves_idle
        rope_dim score_pairs state_bytes
    """,
    parallel="""
        RanksError anywhere check_shard cut first_rank_first for_disk gather is_loss is_sharded
        joined launched part part_of rank_and_size shard_ share_folder total wait whole
        whole_parameters
    """,
    residual="""
        Residual
    """,
    residual_sum="""
        SumResidual
    """,
    residual_attention="""
        DepthAttention attend_depth
    """,
    residuals="""
        RESIDUALS build_residual
    """,
    mtp="""
        FurtherToken FurtherTokens further_loss
    """,
    situ="""
        GATE_BOUND UP_BOUND situ_gate situ_up
    """,
    latent_space="""
        LatentSpace
    """,
    dense="""
        ACTIVATIONS FeedForward GATED activate gated is_gated
    """,
    experts="""
        DispatchPlan Experts dispatch_plan expert_backend expert_counts lengthened padded_plan
        run_experts
    """,
    routing="""
        Route Router group_limited_topk load_statistics max_violation scale_weights sequence_loss
        sigmoid_route switch_loss
    """,
    router_standard="""
        StandardRouter softmax_route
    """,
    router_aux_tc="""
        AuxLossRouter
    """,
    router_noaux_tc="""
        BiasRouter
    """,
    router_quantile="""
        QuantileRouter count_reach quantile_of reach
    """,
    routers="""
        ROUTERS
    """,
    moe="""
        MoE RouterStats TopKGate update_biases
    """,
    feedforward="""
        FEED_FORWARDS build_feed_forward feed_forward_kind
    """,
    network="""
        Block INIT_STD KimiConfig KimiModel ModelOutput costs count_parameters
        forward_flops_per_token init_parameters measured_forward_flops_per_token mtp_flops_per_token
        parameter_generator training_flops_per_token
    """,
    decoder="""
        Decoder
    """,
)
