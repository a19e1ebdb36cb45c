"""Functions of tables of runs: comparisons, designs, verdicts, figures."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    inference="""
        BOOTSTRAP_FROM CORRECTIONS EXACT_FLIPS StatsError adjust bca_interval detectable_dz
        detectable_ncp hedges_factor nct_cdf noncentrality_interval paired_power power_table
        ppl_power seeds_needed sign_flip_pvalue t_interval t_power t_pvalue tost_pvalue welch
    """,
    judge="""
        DIRECTIONS LOST METRICS Metric SPLIT_WORDS TESTS Verdict WORDS beyond_margin compare
        family_statistics metric_info p_words verdict
    """,
    claims="""
        WHOLE claim comparisons with_targets
    """,
    design="""
        AA_TESTS ScalingFit UNEQUAL aa_calibration component_contrasts correlations factorial
        fit_power_law more_seeds pairing_gain
    """,
    plots="""
        BANDS COLORS LINES MARKERS P_COLUMNS STYLE Table Tables WORD_COLORS axis_label cell finished
        forest front heatmap ink level_label loss_curves lr_sensitivity need panels pareto save
        short_number styled table
    """,
    pictures="""
        correlation_matrix expert_load factorial_effects interaction power_curve scaling_fit spectra
    """,
)
