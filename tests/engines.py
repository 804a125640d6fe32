"""Which tests run on one engine only, and why. Every other test runs on our kernels and on ATen operators.

Each engine is so held against the oracles of the other: the dense reference, golden data, finite differences, PyTorch's
layers. A test that is new, or in a new file, runs on both without being told.
"""

NO_ATTENTION = (
    "test_accuracy_page.py",
    "attacks/test_hostile_input.py::test_hostile_yaml",
    "attacks/test_hostile_input.py::test_extreme_numbers",
    "attacks/test_hostile_input.py::test_a_negative_number",
    "test_backends.py::test_a_class_becomes",
    "test_backends.py::test_constructors",
    "test_backends.py::test_derivatives",
    "test_backends.py::test_efficient_local",
    "test_backends.py::test_golden",
    "test_backends.py::test_keywords_of",
    "test_backends.py::test_linformer",
    "test_backends.py::test_low_precision",
    "test_budget.py",
    "test_catalogue.py::TestDocumentation",
    "test_catalogue.py::TestPictures",
    "test_config.py",
    "test_explore.py",
    "test_golden.py::test_every_golden",
    "test_golden.py::test_golden_fibottention",
    "test_golden.py::test_golden_shuffles",
    "test_golden.py::test_published",
    "test_golden.py::test_the_golden",
    "test_golden.py::test_worked",
    "test_imports.py",
    "test_mask_algebra.py::TestFromCsr",
    "test_mask_algebra.py::TestFromDense",
    "test_mask_algebra.py::TestFromFunction",
    "test_mask_algebra.py::TestOperations",
    "test_mask_algebra.py::TestPerHead",
    "test_mask_algebra.py::TestValue",
    "test_mask_algebra.py::test_",
    "test_masks.py::TestCosts",
    "test_masks.py::TestFactories",
    "test_masks.py::TestLoadConfig",
    "test_masks.py::TestPictures",
    "test_masks.py::TestTorchVersion",
    "test_ops.py::TestReference",
    "test_pruning.py::test_a_broken",
    "test_pruning.py::test_a_budget",
    "test_pruning.py::test_a_ratio",
    "test_pruning.py::test_edges_stay",
    "test_pruning.py::test_measured",
    "test_pruning.py::test_one_key",
    "test_pruning.py::test_pairs",
    "test_pruning.py::test_prefix",
    "test_pruning.py::test_random",
    "test_pruning.py::test_relative",
    "test_pruning.py::test_scores_are_for",
    "test_pruning.py::test_scores_that",
    "test_pruning.py::test_the_best",
    "test_pruning.py::test_what_cannot_be_honoured",
    "test_random_masks.py::TestCounts",
    "test_random_masks.py::TestOpenSeeds",
    "test_register_mask.py::TestForms",
    "test_register_mask.py::TestRegistration::test_a_process",
    "test_registry.py::test_a_prefix",
    "test_registry.py::test_counts",
    "test_registry.py::test_every",
    "test_registry.py::test_parameters",
    "test_registry.py::test_the_edges",
    "test_solve.py::test_a_mask",
    "test_solve.py::test_every",
    "test_solve.py::test_long",
    "test_solve.py::test_no_",
    "test_solve.py::test_numbers",
    "test_solve.py::test_operations",
    "test_solve.py::test_pruning",
    "test_solve.py::test_the_",
    "test_solve.py::test_what",
)
"""Masks, configurations, files, or attention without edges: no operator that an engine computes is ever called.

A test listed here that calls one all the same fails.
"""

OWN_CHOICE = {
    "attacks/test_hostile_input.py::test_the_command_line": "runs programs that choose for themselves",
    "test_bench.py": "compares the engines, and others",
    "test_cli.py": "runs programs that choose for themselves",
    "test_extras.py": "runs a program that chooses for itself",
    "test_flex.py": "FlexAttention computes, which is no engine of ours",
    "test_engine.py": "is about the choice; what compares engines says so itself",
    "test_notebooks.py": "runs notebooks in processes of their own",
    "test_numbers.py::test_dense_parts_round": "is about the sums of our kernels",
    "test_registry.py::test_it_is_a_matter_of_time": "chooses a kernel of one engine",
    "test_registry.py::test_the_kernel_that_is_forced": "chooses a kernel of one engine",
    "test_selection.py::test_a_k_of_more": "a warning comes once in a process",
    "test_robustness.py": "forks, threads, signals and memory of the kernels; those of ATen operators: test_engine.py",
    "test_bench_latency.py": "compares methods, and others",
    "test_bench_accuracy.py": "runs programs that choose for themselves",
    "test_toolbox.py::TestWholeGraphs::test_inductor": "what inductor makes of the operators does not depend on it",
    "test_toolbox.py::test_two_processes": "trains in processes of their own",
    "train/": "trains for seconds through layers that are compared elsewhere",
}
"""Tests that choose an engine themselves, or are about one."""


def runs_on_both(node_id: str) -> bool:
    """Whether the test at a node id, counted from the folder of the tests, runs on both engines."""
    return not node_id.startswith((*NO_ATTENTION, *OWN_CHOICE))
