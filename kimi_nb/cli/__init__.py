"""The command line."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    shared="""
        ASKED Parser TOLD add_command add_json add_scores add_setting add_settings add_tracking
        add_yes at_least_one begin_long cell_text chosen_run given_settings print_table
        results_store scorer shown starting_run table_text terminal_width tracking_asked
        with_short_warmup without_controls
    """,
    one_run="""
        SAMPLING SHOWN_METRICS add_data add_eval add_generate add_setting_named add_trace add_train
        cmd_data cmd_eval cmd_generate cmd_trace cmd_train converse keep_scores metrics_text
        print_pieces print_task_scores score_number score_text tracker
    """,
    studies="""
        add_new_phase add_plan add_profiles add_run add_study_options arms_asked_for cmd_new_phase
        cmd_plan cmd_profiles cmd_run declared dry_run plan_of print_card profile_facts profile_text
        run_declared runner_options seeds_asked_for sequential_plan setting_line
    """,
    records="""
        ACTIONS LISTED add_records add_report cmd_records cmd_report compare_two export_file
        import_file open_profile publish_profile refuse_a_name send_records show_list show_one
        verify_folder
    """,
    machine="""
        OTHERS add_bench add_env add_lab cmd_bench cmd_env cmd_lab done_so_far installed lab_command
        next_steps runs_so_far where_it_stands
    """,
    entry="""
        FAMILIES STOPPED build_parser call ended_by_sigterm error_line main traceback_file
        with_streams
    """,
    verdicts="""
        add_judge add_noise add_reading cmd_judge cmd_noise margins_of named_settings noise_frame
        noise_json number_above_zero roles_of trained
    """,
    completion="""
        SCRIPTS Words add_completion bash_script cmd_completion every_command fish_script
        what_follows zsh_script
    """,
    search="""
        Search Tried held_search read_search search_text
    """,
    gate="""
        STATUS add_gate answer_text asked cmd_gate command_words gate_rule number_printed
        read_values search_lines
    """,
    sizes="""
        COLUMNS add_batch add_memory cmd_batch cmd_memory study_runs
    """,
    choosing="""
        add_menu cmd_menu
    """,
)
