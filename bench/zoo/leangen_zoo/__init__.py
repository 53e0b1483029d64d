"""Models that leangen's bench/train made; `leangen.catalog.zoo` says what they are."""
