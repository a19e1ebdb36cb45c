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
    judge="""
        DIRECTIONS FORMS Seen beyond_margin check_claim claimed_sign decide direction_seen
        family_size_of found_better joint_finding lost_runs not_in_table row_of said_whole say seen
        size_seen survivors word_for
    """,
    comparison="""
        LOST Rule TESTS compare family_statistics paired words_of
    """,
    claims="""
        WHOLE analysed claim comparisons to_target with_late with_targets
    """,
    design="""
        AA_TESTS ScalingFit Simulated TwoLevel UNEQUAL aa_calibration by_seed component_contrasts
        correlations factorial fit_power_law more_seeds pairing_gain two_level
    """,
    plots="""
        BANDS COLORS FAR HEADS LINES MARKERS OF_ITS_ROW P_COLUMNS STYLE Table Tables WORD_COLORS
        axis_label better_arrow column_head error_band findings_table finished forest frame_of front
        heatmap ink level_label look loss_curves lr_sensitivity need panels pareto save styled table
    """,
    pictures="""
        cell_intervals correlation_matrix expert_load factorial_effects interaction power_curve
        scaling_fit spectra
    """,
    answer="""
        AnswerBox AnswerRow BADGES HEIGHT SHOWN_AT_ONCE SIZES WIDTH answer_box answer_markdown
        answer_rows banner decides_nothing effect_with_interval interval_picture reach_of size_words
    """,
    reading="""
        SHOWN read_comparisons read_correlations read_curves read_load read_means read_plan
        read_tradeoff
    """,
)
