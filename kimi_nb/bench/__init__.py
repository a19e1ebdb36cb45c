"""Clocks: speed, memory, utilisation."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    speed="""
        COSTS NEW_TOKENS SpeedError TEAM TURN UNDISTURBED cost_shape measure over_context remembered
        speed_caveats speed_comparison speed_rounds
    """,
    step="""
        Profiled ProfilingError Utilisation profile_steps profiled repeat_spread repeated_run
        spread_with_and_without stacked_and_single stepping utilisation
    """,
    nanogpt="""
        Comparison NanoGPTComparison nanogpt_equal
    """,
    suite="""
        BENCHES GPT2 KEPT bench_decode bench_example bench_kept_memory bench_kernels bench_linear
        bench_long_decode bench_moe bench_muon bench_nanogpt_loss bench_nanogpt_speed bench_plan_run
        bench_repeats bench_stacked bench_start bench_tokenizers bench_training_step
        bench_utilisation example_run kept_for_backward looped_experts nanogpt_run precisions
        ratio_row row run_bench shakespeare side_by_side
    """,
    stages="""
        ARMS Place STAGES Stage attention_and_maxima causal_blocks furthest kernel_maxima_ of_each
        place_at read_stages run_stages
    """,
    __main__="""
        add_bench_options bench_command
    """,
    batch="""
        BatchTry LargestBatch bisected largest_batch memory_limit try_batch
    """,
)
