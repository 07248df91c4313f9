"""Which test answers which fault of the catalogue, where the test has not the row's number in its own name.

Rows are numbered as in the catalogue of faults that the project was built against:
A 1-27 death of processes, B 28-42 disks, C 43-60 shards, D 61-73 images, E 74-86 numbers, F 87-100 artifacts and
versions, G 101-113 concurrency and environment. `test_catalogue.py` checks that every row stands somewhere once at
least, and that every test named here exists.
"""

ROWS = range(1, 114)

ELSEWHERE: dict[int, tuple[str, ...]] = {
    # A: death of processes
    1: (
        "stages/test_extract_features.py::test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes",
        "faults/test_disturbed.py::test_killed_at_random_moments_a_stage_ends_with_the_same_files",
    ),
    3: (
        "codebooks/test_resume.py::test_a_run_stopped_at_any_block_ends_in_the_same_bytes",
        "stages/test_kmeans.py::test_a_killed_run_is_finished_by_the_same_command",
    ),
    5: (
        "training/test_resume.py::test_a_killed_run_is_the_same_run",
        "faults/test_disturbed.py::test_killed_at_random_moments_a_stage_ends_with_the_same_files",
    ),
    8: ("training/test_resume.py::test_a_run_killed_again_and_again_is_the_same_run",),
    10: ("faults/test_disturbed.py::test_killed_at_random_moments_a_stage_ends_with_the_same_files",),
    12: (
        "stages/test_evaluate_resume.py::test_wherever_it_is_cut_the_same_command_goes_on_to_the_same_files",
        "stages/test_evaluate_resume.py::test_report_is_the_same_after_two_kills_while_saving",
    ),
    13: (
        "stages/test_generate.py::test_a_cut_run_goes_on_to_the_same_bytes",
        "faults/test_disturbed.py::test_killed_at_random_moments_a_stage_ends_with_the_same_files",
    ),
    14: (
        "training/test_faults.py::test_a_signal_during_a_save_loses_nothing",
        "stages/test_pipeline.py::test_a_terminated_run_saves_and_resumes_to_the_same_weights",
    ),
    16: ("training/test_faults.py::test_a_signal_during_a_save_loses_nothing",),
    21: ("data/test_batches.py::test_a_killed_or_hanging_worker_is_an_error",),
    22: ("data/test_batches.py::test_a_killed_or_hanging_worker_is_an_error",),
    23: ("training/test_faults.py::test_where_a_rank_is_killed_the_others_end_in_one_line",),
    # B: disks
    29: (
        "training/test_faults.py::test_a_save_that_fails_leaves_what_was_there",
        "training/test_faults.py::test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_room",
    ),
    42: ("data/test_tars.py::test_a_shard_that_changes_during_a_job_is_an_error",),
    # C: shards
    43: ("data/test_tars.py::test_every_truncation_is_an_error",),
    44: ("data/test_tars.py::test_every_truncation_is_an_error",),
    45: (
        "data/test_tars.py::test_a_damaged_header_is_an_error",
        "data/test_tars.py::test_two_joined_tars_are_an_error",
    ),
    48: (
        "data/test_tars.py::test_an_empty_tar_has_no_images",
        "data/test_images.py::test_names_without_images_are_an_error",
    ),
    49: ("data/test_images.py::test_globs_and_brace_patterns",),
    50: (
        "data/test_batches.py::test_ordered_batches_skip_and_count_bad_images",
    ),  # workers share out images, whatever shards they lie in
    51: ("data/test_tars.py::test_invalid_members_are_an_error",),
    53: ("data/test_tars.py::test_interleaved_members_of_a_key_form_a_sample",),
    55: (
        "data/test_tars.py::test_invalid_members_are_an_error",
        "data/test_examples.py::test_num_classes_follows_the_labels",
    ),
    56: ("data/test_tars.py::test_invalid_members_are_an_error",),
    57: ("data/test_tars.py::test_other_members_are_counted_and_never_followed",),
    58: ("data/test_images.py::test_shell_pipes_are_an_error", "data/test_images.py::test_fsspec_urls_are_opened"),
    59: ("data/test_tars.py::test_other_members_are_counted_and_never_followed",),
    60: ("data/test_tars.py::test_the_index_finds_every_byte",),  # long names
    # D: images
    61: ("data/test_transforms.py::test_bad_images_have_a_reason",),
    62: ("data/test_transforms.py::test_bad_images_have_a_reason",),
    63: (
        "data/test_transforms.py::test_every_pillow_mode_is_converted",
        "data/test_transforms.py::test_inverted_cmyk_jpeg_is_decoded",
    ),
    64: ("data/test_transforms.py::test_every_pillow_mode_is_converted",),
    65: ("data/test_transforms.py::test_bad_images_have_a_reason",),
    66: ("data/test_transforms.py::test_every_pillow_mode_is_converted",),
    67: ("data/test_transforms.py::test_every_pillow_mode_is_converted",),
    68: ("data/test_transforms.py::test_exif_orientation_is_applied_once",),
    69: (
        "data/test_transforms.py::test_bad_images_have_a_reason",
        "data/test_transforms.py::test_the_pixel_limit_is_checked_in_the_header",
    ),
    71: (
        "data/test_transforms.py::test_a_strip_is_cropped_without_resizing_all_of_it",
        "data/test_transforms.py::test_a_long_strip_is_resized_only_where_it_is_kept",
    ),
    73: (
        "data/test_batches.py::test_too_many_bad_training_images_are_an_error",
        "stages/test_evaluate.py::test_an_unreadable_image_is_refused_unless_allowed_and_then_counted",
    ),
    # E: numbers
    74: (
        "training/test_loop.py::test_a_bad_step_moves_nothing_and_is_counted",
        "training/test_loop.py::test_a_run_without_finite_gradients_ends_before_the_weights_move",
    ),
    75: (
        "codebooks/test_features.py::test_features_beyond_float16_name_their_image",
        "codebooks/test_kmeans.py::test_refuses_features_that_cannot_be_clustered",
    ),
    76: (
        "search/test_nearest.py::test_refuses_what_is_not_a_number",
        "quantizers/test_contract.py::test_what_is_not_finite_is_refused_or_in_training_shows",
    ),
    77: ("codebooks/test_kmeans.py::test_refuses_features_that_cannot_be_clustered",),
    78: ("codebooks/test_kmeans.py::test_refuses_features_that_cannot_be_clustered",),
    79: ("codebooks/test_kmeans.py::test_refuses_features_that_cannot_be_clustered",),
    81: ("codebooks/test_kmeans.py::test_empty_clusters_are_filled",),
    82: ("data/test_encode.py::test_tokens_are_stored_narrow_and_read_back",),
    83: ("search/test_nearest.py::test_the_lowest_id_wins_exact_ties",),
    84: (
        "training/test_validation.py::test_the_best_weights_are_kept_also_by_a_run_that_was_resumed",
        "training/test_validation.py::test_a_fall_is_told_from_a_bad_day",
    ),
    85: ("metrics/test_evaluation.py::test_rfid_is_zero_for_the_same_images_and_absent_for_too_few",),
    86: (  # the formula has no matrix square root of an asymmetric matrix, so no imaginary part
        "metrics/test_fid.py::test_gaussians_with_two_bases_agree_with_scipy",
        "metrics/test_fid.py::test_a_set_is_at_distance_zero_from_itself_even_with_fewer_images_than_features",
    ),
    # F: artifacts and versions
    87: ("test_artifacts.py::test_damage_is_found",),
    89: (
        "test_artifacts.py::test_a_manifest_cut_short_or_an_unknown_kind_is_refused",
        "faults/test_fuzz.py::test_any_bytes_are_a_result_or_one_line",
    ),
    92: (
        "models/test_released.py::test_nothing_in_a_pickle_is_run",
        "stages/test_import_checkpoint.py::test_what_cannot_be_imported_is_one_line_and_leaves_nothing",
    ),
    93: ("models/test_released.py::test_callbacks_by_whose_classes_lightning_keyed_its_states_are_inert",),
    94: (
        "models/test_released.py::test_in_any_container_and_under_any_prefix",
        "models/test_released.py::test_every_key_is_needed_and_none_else_is_passed_over",
        "models/test_released.py::test_one_weight_that_does_not_fit_is_one_line",
        "training/test_state.py::test_a_checkpoint_of_another_run_is_refused",
    ),
    95: ("test_artifacts.py::test_another_request_names_the_first_difference",),  # the codebook is one of its inputs
    96: ("stages/test_pipeline.py::test_tokens_of_another_tokenizer_are_refused",),
    97: ("test_artifacts.py::test_another_request_names_the_first_difference",),
    98: ("training/test_resume.py::test_a_run_of_two_ranks_goes_on_with_one_on_the_same_images",),
    100: ("test_artifacts.py::test_a_cut_run_resumes_at_its_first_missing_file",),
    # G: concurrency, environment
    101: ("test_artifacts.py::test_two_writers_cannot_both_write",),
    109: (
        "codebooks/test_pretrained.py::test_offline_the_error_names_the_file_at_once",
        "data/test_tars.py::test_no_cache_without_a_home_directory",
    ),
    111: (  # loader processes ignore the signals of their group; what was begun is written whole
        "data/test_batches.py::test_a_killed_or_hanging_worker_is_an_error",
        "data/test_encode.py::test_an_interruption_waits_for_the_shard_being_written",
    ),
}
"""Row -> tests, as paths below tests/."""

NOT_TESTABLE: dict[int, str] = {
    38: "needs an NFS server and two of its clients; the lock is the kernel's (flock), so one host writes an artifact",
}
"""Row -> why no test here can ask."""
