"""A run's configuration in, its record out."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    variants="""
        ROW_DECAY cautious_decay equal_rows polar_express
    """,
    muon="""
        BF16_FROM ClipReport GATHERED LOOKED_OVER Muon NS_COEFFICIENTS OptimError SCALINGS
        attention_modules compiled_newton_schulz has_bf16_units muon_scale newton_schulz ns_dtype
        qk_clip_ qk_clip_gamma set_logit_tracking
    """,
    optim="""
        Combined Rows adamw_lr_scale build_optimizer describe_groups is_embedding is_expert
        is_hidden_matrix is_router learning_rate load_optimizer_tensors optimizer_tensors
        param_groups rows_of set_lr
    """,
    hardware="""
        DiskError PeakMemory TELLING TrainError deterministic_asked deterministically environment
        free_cores memory_now pick_compile pick_device pick_precision pick_threads told_variables
    """,
    evaluate="""
        DTYPES autocast eval_batch held_out_scores ids_on score_windows
    """,
    checkpoint="""
        CheckpointError check_fields checkpoints load_checkpoint load_model load_model_tensors
        model_tensors read_state save_checkpoint save_model
    """,
    trainer="""
        LOAD_POINTS Trainer counted_load pick_micro_batch with_vocabulary
    """,
    journal="""
        Journal Lines NO_CURVES Writer disk_of known_part parse_journal
    """,
    loop="""
        Interrupted Session TrainOptions advance alone_in announce curve_metrics evaluate_now
        finish_run fit has_diverged is_due newest_checkpoint open_session run_identity
        run_provenance save_now score_metrics size_metrics stop_here stop_requested take_steps
        time_metrics with_threads write_step
    """,
    stacked="""
        InTurn Stack Stacked StackedEmbedding StackedLinear StackedMoE StackedNorm fit_stacked join_
        joint_optimizer stack_modules stacking_refusal take_steps_together
    """,
)
