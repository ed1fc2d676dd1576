"""Which prompts the grid shows."""

import numpy as np

from spin_plugin.report.sample import PromptStats, choose_prompts


def stats(trained: int = 100, held_out: int = 20, *, asked: bool = True) -> PromptStats:
    found = PromptStats.empty(trained, held_out)
    found.asked[:] = asked
    return found


def test_extremes_of_each_order_and_held_out_prompts_are_chosen() -> None:
    found = stats()
    found.add_pairs(np.array([40, 41, 42]), np.full(3, 9), np.array([-3.0, 2.0, 0.0]), np.array([-9.0, 5.0, 0.0]))
    found.longest[77] = 900
    chosen = choose_prompts(found, 5)
    # 40 lost most, 41 is least separated, 77 is longest; one of them all may be any
    assert chosen[:3] == [40, 41, 77]
    assert chosen[3] >= 100
    assert len(set(chosen)) == 5


def test_worst_iteration_counts_and_unknown_rewards_do_not() -> None:
    found = stats(asked=False)
    prompts = np.array([1, 1, 2])
    found.add_pairs(prompts, np.array([3, 5, 4]), np.array([0.5, -1.0, np.nan]), np.array([0.0, 0.0, 1.0]))
    found.add_pairs(prompts, np.array([1, 1, 1]), np.array([0.2, np.nan, np.nan]), np.array([2.0, np.nan, np.nan]))
    assert found.lowest_real[1] == -1.0
    assert found.lowest_margin[1] == 0.2 - 2.0
    assert np.isnan(found.lowest_real[2])
    assert found.longest[:4].tolist() == [0, 5, 4, 0]
    assert np.flatnonzero(found.asked).tolist() == [1, 2]


def test_every_asked_prompt_is_chosen_if_there_is_room_and_no_other() -> None:
    found = stats()
    found.asked[30:] = False
    assert sorted(choose_prompts(found, 1000)) == list(range(30))


def test_choice_is_reproducible_and_mixed() -> None:
    found = stats(10_000, 200)
    chosen = choose_prompts(found, 200)
    assert chosen == choose_prompts(found, 200)
    held_out = sum(prompt >= 10_000 for prompt in chosen)
    assert 60 < held_out < 110  # of three orders, as no reward is known, one has only held-out ones
