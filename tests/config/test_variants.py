"""Default labels of variants."""

from scop.config import VariantSection


def test_default_label_lists_the_settings() -> None:
    def label(**settings: object) -> str:
        return VariantSection.model_validate(settings).label

    assert label() == "scop-0.45"
    assert label(selection="global", prune_rate=0.3) == "scop-global-0.3"
    assert label(selection="global", budget={"macs": 0.442}) == "scop-global-macs-0.442"
    assert label(method="l1", budget={"latency_ms": 12.5}) == "l1-latency_ms-12.5"
    assert label(selection="knockoff_plus", fdr=0.2) == "scop-knockoff_plus-0.2"
