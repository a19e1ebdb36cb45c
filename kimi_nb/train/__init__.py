"""A run's configuration in, its record out."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    optim="""
        BF16_FROM ClipReport Combined GATHERED Muon NS_COEFFICIENTS OptimError SCALINGS
        adamw_lr_scale attention_modules build_optimizer describe_groups has_bf16_units is_expert
        is_hidden_matrix is_router learning_rate load_optimizer_tensors muon_scale newton_schulz
        ns_dtype optimizer_tensors param_groups qk_clip_ qk_clip_gamma set_logit_tracking set_lr
    """,
    hardware="""
        DiskError PeakMemory TrainError deterministic_asked deterministically environment
        pick_device pick_precision
    """,
    evaluate="""
        DTYPES autocast held_out_scores score_windows
    """,
    checkpoint="""
        CheckpointError checkpoints load_checkpoint load_model load_model_tensors model_tensors
        read_state save_checkpoint save_model
    """,
    trainer="""
        LOAD_POINTS Trainer counted_load pick_micro_batch
    """,
    loop="""
        Interrupted fit stop_requested
    """,
)
