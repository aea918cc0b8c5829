"""Which prompts of a set are used when not all are: every tier its share, whatever the order of the file."""

from __future__ import annotations

from collections.abc import Sequence

from .prompts import TIERS, Prompt, lot


def choose_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most ``count`` of ``prompts``, each tier in proportion to its size, in the order given.

    Inside a tier a hash of their ids decides, so the same set gives the same prompts on every machine and with every
    seed, and no kind of prompt is favoured for standing at the beginning. Places that don't divide go to the tiers
    with the largest remainders, the easier first where they are equal (Hamilton's method).
    """
    if count >= len(prompts):
        return list(prompts)
    tiers = {tier: [prompt for prompt in prompts if prompt.tier == tier] for tier in TIERS}
    places = {tier: count * len(own) // len(prompts) for tier, own in tiers.items()}
    by_remainder = sorted(TIERS, key=lambda tier: -(count * len(tiers[tier]) % len(prompts)))
    for tier in by_remainder[: count - sum(places.values())]:
        places[tier] += 1
    chosen = {
        prompt.id
        for tier, own in tiers.items()
        for prompt in sorted(own, key=lambda prompt: lot("choice", prompt.id))[: places[tier]]
    }
    return [prompt for prompt in prompts if prompt.id in chosen]
