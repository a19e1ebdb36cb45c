"""Words: the paper, the slides, the guide."""

from kimi_nb import lazily

__getattr__, __dir__, __all__ = lazily(
    __name__,
    parts="""
        LEVEL_NAMES MARGIN PARTS_HEADS PART_CHANGES PART_COSTS PART_NAMES PartSeen RATES RECIPE
        agreement_line answer_lines best_cell best_line best_recipe budget_line cell_in_words
        crossed_runs effect_in_numbers fairness_in_words inside_each_optimizer part_effects
        part_in_words parts_line parts_markdown parts_rows parts_seen rates_figure rates_line
        rates_runs size_in_words sizes
    """,
    document="""
        DocumentError Figure Manuscript Marked Section TEMPLATES TableBlock Text as_text blocks_of
        cited code marked numbered refer render sentence written
    """,
    forms="""
        REFERENCES ROOM SMALLEST WIDE_ROOM aligned bring compile_typst inline pandoc picture source
        svg_size table_markdown to_html to_markdown to_typst turned_pages typst_head write_document
    """,
    evidence="""
        Compared Evidence OnMachines Ran ReportError abouts machine_name said span_of with_arrival
    """,
    tables="""
        BOUND COMPUTED REPEATED RUN_COLUMNS RUN_METRICS SIZES WHOLE_LENGTH WHOLE_TABLES WIDEST
        answer_table benchmark_table bold cells_table comparison_table could_have_seen effects_table
        environment_table every_run figure finding_table heading inside_table interval kept_tables
        mean_sd measured p_cell reached runs_table size_table study_table tuning_table
    """,
    sentences="""
        LEVELS PARTS agreement_told compute_words effect_words floor_words kept_agreements
        pairs_words parts_short parts_words seeds_words tally text_words together_words turned
        with_other_text
    """,
    across="""
        Claim TESTED agreement at_size changes_words claim_name claims_at claims_markdown claims_of
        claims_table claims_words compared counts_words draw_scores draw_sizes effect_changes
        effect_text how_large main_figures names_of others scores_markdown scores_section
        scores_words settings_apart shared_phases sizes_appendix sizes_figure sizes_section
        sizes_words what_ran
    """,
    paper="""
        LEAD LONGEST METHOD_CHECKS TITLE UNTESTED abstract all_comparisons answers answers_like
        answers_over appended_phases appendices best_words body_phases build_paper caveats_of
        combined_tables combined_words conclusion draw_own further_figures grid_table in_turns
        negative_results own_findings phase_section phase_tables reproducibility set_up threats
        tokens_each
    """,
    slides="""
        MOST_SLIDES Notes PARTS_TABLE Slide build_slides bullets figure_of largest_pair own_slides
        redrawn reference_file screen shared_slide slides_of talk_markdown talk_typst write_slides
    """,
    guide="""
        ANSWERS Advice CHAPTERS HOWTO Lesson VIRTUES advice_table advise answers_agree course
        howto_pages lessons_table read_lesson seeds_in_words wing_lines
    """,
    machines="""
        Agreement MACHINE_SETTINGS PARTED RESULTS TUNED_SETTINGS agree agreement_data
        agreement_figure agreement_words chosen_rates common_runs grid_steps open_results
        parting_step rates_apart short_names spread_apart without_machine words_apart
    """,
    short="""
        SHORT_PARTS ShortAnswer build_short question_figure short_answers staying
    """,
    card="""
        ReportCard card_of card_rows card_text effect_with_unit next_lines open_words silent_phases
        time_words unmarked write_card
    """,
    write="""
        pictures_beside short_report write_report
    """,
    literature="""
        PUBLISHED_CLAIMS PublishedClaim answer_here claims_page found_here library_entry
        reference_link share_of_steps
    """,
    by_size="""
        NEAR SizeAnswer answers_at answers_by_size apart forecast_answer ladder_advice
        later_findings later_parts_line later_parts_table measured_rungs rungs_in_words
        tokens_a_parameter
    """,
    judgement="""
        HEAD by_metric finding_row fitted forest_marks judged_forest judged_heading judged_html
        judged_json judged_markdown judged_text round_ticks
    """,
)
