"""Processes: which runs, where, how many at a time."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    clock="""
        matrix_peak seconds_of settle
    """,
    attempt="""
        Crowded Need PlanInterrupted RunnerError ScoredFolder Unit distinct least_memory pending
        refuse_too_large run_one run_stack start_process units_of usable vocabulary_size
    """,
    cluster="""
        ClusterError connected has_gpus room spread
    """,
    forecast="""
        H100 SHARING StepTimer default_workers expect_h100 measure_sharing pick_sharing pick_workers
        predict_seconds read_sharing read_timings shape_key share_of_cores steering_variables
        step_flops time_step visible_gpus weight
    """,
    pool="""
        EXECUTORS ONLY_LOOKS Progress RunnerOptions STACK STACKS_PAY Worker bars_with_own_lock
        only_looking only_looks run_studies run_study
    """,
    tuning="""
        BESIDE Choice MOST_GROWN TUNING_SEEDS Tuning descend first_tuning fixed grown line_search
        mean_losses search tuned tuning_arm tuning_study vertex
    """,
    apart="""
        ACTIVE Apart LiveError LiveRun last_started live_runs start_run train_apart
    """,
    branches="""
        branch budget_runs decay_branches leaves_at
    """,
)
