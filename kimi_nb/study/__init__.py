"""What is asked and what came out, as data; no torch."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    code="""
        SETTINGS_FILES TABLES TRAINING_WINGS asked_for code_hash component_of definitions files_of
        hash_definitions properties spelled training_files without_docstrings
    """,
    record="""
        EqualCode NUMBERS PROVENANCE RESERVED Record RecordError canonical digest_of equal_code_file
        plain seal shown_equal shown_since unseal
    """,
    arms="""
        Arm Declaration LONGEST_NAME Planned Study
    """,
    factors="""
        FACTORS cell_delta cell_factors cell_name cells equal_cost_width factor_delta
        factor_settings with_factors
    """,
    folder="""
        EXPERIMENTS JournalReader LOCKS RUN_FOLDER RunBusy RunFiles RunFolder RunPlace StoreError
        bounded_rest journal_line list_folder pretty private_folder read_sealed read_stored
        readable_name record_beside remove_folders_left remove_if_left tidy_folder write_sealed
    """,
    ledger="""
        Ledger Runs RunsBase gives_way in_order read_manifest same_comparison why_aside
        with_more_seeds
    """,
    metrics="""
        COST EXPERTS MARGINS METRICS Metric QUALITY SCORES SIZE SPLIT_WORDS TRAINING metric_info
    """,
    outcome="""
        CONFIRMS FLOOR FigureAbout Finding KeptTable NOT_RUN Outcome PhaseAbout WORDS declared_apart
        figures_folder finding_of guarded load_outcome not_testable outcome_file outcome_problems
        outcomes_by_profile outcomes_of questions_of read_outcome record_outcome results_folder
        sealed_outcome vouched write_outcome
    """,
    curves="""
        gradient_statistics loss_statistics running_median steps_to
    """,
    store="""
        LARGEST MEASURED Store
    """,
)
