"""Widgets: the workbench and the explorers."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    choices="""
        Setting change command_line crowding estimate_seconds field_comments python_code quick_costs
        section_help setting_help settings_of trailing_comments typed_value vocabulary why_not
    """,
    markup="""
        HUES View error_html error_words hue interactive page script_text style_sheet table_of
        table_row tag together
    """,
    svg="""
        block_svg chart_svg load_svg nice_ticks svg_drawing svg_text thin_points
    """,
    parts="""
        Names Part SAID SPELLED component_name component_settings has_part measured_profile parts_of
        put_off put_on run_name run_of runs_like setting_name settled without_parts
    """,
    picker="""
        PickedRun Picker SUGGESTED Switches arms_html cost_html cost_rows elsewhere_html factors_of
        factors_page keeping_quiet phase_picker pick_config picker_page
    """,
    live="""
        Follower LiveView arm_curve baseline_curves curve_points curves_html follow_record live_page
        live_view progress_html roomy_threads smooth
    """,
    pinboard="""
        CURVES Curve Look Pinboard USUAL arm_keys compare_html difference_table find_runs
        legend_html lines_of overlay_svg paired_finding pinboard_page seed_pairs setting_columns
        short_name show_pinboard unlike_most verdict_html verdict_words
    """,
    views="""
        KINDS TINTS attention_figure example_model matrices next_token next_token_figure rank_html
        rank_table rope_figure routed_load routed_text routes samples_html singular_values
        spectrum_figure training_change update_of_a_step
    """,
    explore="""
        ALL EXPLORERS Subject TEXT WHATS attention_explorer explorer_pictures explorers note panel
        playground rope_explorer router_explorer spectrum_explorer trained_runs
    """,
    menu="""
        MENU MenuEntry MenuView THIS_PROGRAM command_of menu_text possible_answers talk
    """,
    copies="""
        Desk LAID cells_digest lay_out lay_out_notebooks lend_models with_profile
    """,
    workbench="""
        Memory PlanState PlanView TABS Workbench open_workbench plan_html plan_page workbench_page
    """,
)
