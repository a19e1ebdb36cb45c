"""Widgets: the workbench and the explorers."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    choices="""
        Setting change command_line estimate_seconds field_comments python_code quick_costs
        section_help setting_help settings_of vocabulary why_not
    """,
    svg="""
        HUES STYLE_TAG block_svg chart_svg hue load_svg nice_ticks page thin_points
    """,
    picker="""
        Picker SUGGESTED View cost_html cost_rows factors_of factors_page interactive phase_picker
        picker_page
    """,
    live="""
        Follower LiveView curves_html follow_record live_page live_view progress_html smooth
    """,
    pinboard="""
        CURVES Pinboard RESULTS arm_keys compare_html difference_table find_runs legend_html
        overlay_svg paired_statistics pinboard_page setting_columns short_name unlike_most
    """,
    views="""
        CARD KINDS TINTS attention_figure example_model matrices next_token next_token_figure
        rank_html rank_table rope_figure routed_load routed_text routes samples_html singular_values
        spectrum_figure training_change update_of_a_step
    """,
    explore="""
        ALL EXPLORERS Subject TEXT WHATS attention_explorer explorer_pictures explorers note panel
        playground rope_explorer router_explorer spectrum_explorer trained_runs
    """,
    planview="""
        PlanState PlanView plan_html plan_page plan_view
    """,
    workbench="""
        TABS Workbench workbench_page
    """,
)
