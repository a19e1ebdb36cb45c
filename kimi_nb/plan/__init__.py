"""All phases in order, headless, and what is published of them."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    run="""
        ANALYSIS PlanError PlanReport check_grids check_kernel check_parameters execute_phase
        executed_copy kernel_command parameter_names phase_key phase_notebooks phase_studies phases
        pick_phases plan_table reads_outcomes run_plan summary takes_long time_by_part timing
        used_files
    """,
    phase="""
        Phase TemplateError changed_profile export_notebooks new_phase open_phase
    """,
    publish="""
        COLOURS FORMAT LIMIT MODELS MOST_WEIGHTS NAMES POINTS PublishError SHOWN bundle
        check_finished headline kept_models models_of open_published publish_records published
        published_profiles read_bundle records_of slim_notebook small_png small_svg source_of
        studies_of where_from
    """,
    lesson="""
        AnswerPlace answer_at_top change_outcome change_study try_change
    """,
    rounds="""
        ANSWERED FUTILE FUTILITY IN_ROUNDS OPEN OUT_OF_RUNS Question SPENT Sequential check_looks
        crossed_factors in_rounds look_at_study looks_file questions_of_study rounds_summary
        rounds_table run_rounds run_sequential takes_halves write_looks
    """,
)
