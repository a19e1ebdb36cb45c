"""Functions of tables of runs: comparisons, designs, verdicts, figures."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    inference="""
        BOOTSTRAP_FROM CORRECTIONS DRAWN_FLIPS EXACT_FLIPS StatsError adjust bca_interval
        detectable_dz detectable_ncp hedges_factor nct_cdf noncentrality_interval paired_power
        power_table ppl_power seeds_needed sign_flip_pvalue t_interval t_power t_pvalue tost_pvalue
        welch
    """,
    words="""
        NOTHING amount capital cell counted difference duration listed number p_words percent
        short_number
    """,
    verdict="""
        DECIDED DIRECTIONS FORMS Seen about_text beyond_margin check_claim claimed_sign decide
        declared_margin digits_of direction_seen family_size_of found_better in_two_words
        joint_finding left_by_divergence lost_runs metric_of not_in_table row_of said_whole say seen
        size_seen survivors word_for
    """,
    comparison="""
        LOST Rule TESTS compare family_statistics mixed_places paired places_of with_words
    """,
    claims="""
        WHOLE analysed claim comparisons counted_whole to_target with_late with_targets
    """,
    design="""
        Estimates ScalingFit TwoLevel arms_of_cells by_seed cell_signs component_contrasts
        contrast_by_seed contrast_table correlations effects_by_seed estimates_of factorial
        fit_power_law lost_by_arms more_seeds over_seeds pairing_gain two_level weights_of_arms
    """,
    plots="""
        BANDS COLORS FAR HEADS LINES MARKERS OF_ITS_ROW P_COLUMNS STYLE Table Tables WORD_COLORS
        axis_label better_arrow column_head error_band findings_table finished forest frame_of front
        heatmap ink level_label look loss_curves lr_sensitivity name_verdicts need panels pareto
        save styled table
    """,
    pictures="""
        cell_intervals correlation_matrix effects_inside expert_load factorial_effects interaction
        power_curve scaling_fit spectra
    """,
    answer="""
        AGAINST_MARGIN ANSWERING AnswerBox AnswerRow BADGES HEIGHT SHOWN_AT_ONCE WIDTH answer_box
        answer_markdown answer_rows banner decides_nothing effect_with_interval interval_picture
        reach_of size_words
    """,
    reading="""
        NAMED_AT_MOST read_comparisons read_correlations read_curves read_load read_means read_plan
        read_tradeoff
    """,
    screens="""
        aliases fraction resolution
    """,
    inside="""
        against_best partners simple_effects
    """,
    errors="""
        beside_text contrast_text_error level_noise mixed_effects noisier_level text_error
        with_text_error
    """,
    calibration="""
        AA_TESTS ALLOWED JudgedCells RunSpread Simulated aa_calibration any_by_holm drawn_cells
        drawn_study judged_cells run_spread
    """,
    foreign="""
        LARGEST_FILE LARGEST_UNPACKED Loaded Numbers PASTED SEPARATORS cells_of file_bytes json_in
        numbers_of parquet_in read_table separator_of table_in text_of unpacked
    """,
    trackers="""
        compiled fields_of from_chart from_harness from_logs from_tensorboard from_trackio
        harness_rows is_chart is_harness messages_of named_rows read_runs scalars_of split_names
    """,
    roles="""
        ARM_COLUMNS BASELINES RunTable SEED_COLUMNS better_way column_named first_named guess_metric
        longer runs_of
    """,
    judging="""
        Chance Judged chance_of compared_rows guess_baseline how_compared judge judged over_items
        runs_needed seeds_for two_axes unpaired
    """,
    spread="""
        CAUSES Noise SEED_COUNTS Spread by_cause causes_in noise noise_sentences spread_of visible
    """,
    anytime="""
        EFFECTS SPENDING bounds_of chance_to_cross chance_to_decide chance_to_reach e_process log_e
        open_levels planned_levels r_of scale_free t_needed t_of
    """,
    keep="""
        Answer DROP GateRule KEEP KnownSpread MORE NOTHING_KNOWN Searched TESTS_OF_GATE WORLDS
        drawn_improvements improvements keep_or_drop search_all
    """,
    looks="""
        Factorial HALVES_FROM Played ROUNDS_SPENDING answered chance_of_answer in_half look_level
        play truth_of
    """,
    scored="""
        FEWEST_ARMS MEASURED_WITH beyond_loss enough score_relations scored_arms setting_columns_of
        task_columns task_pairs telling_tasks
    """,
    rungs="""
        DRIFT Forecast SCATTER compute_equivalent decision_accuracy effect_ladder forecast_effect
        forecast_rung known_error score_forecast
    """,
)
