import pytest

from shared.bases.catalogue import BUILT_IN, Base, load_catalogue
from shared.bases.known_models import known_model, known_models
from shared.errors import NotFound


def test_every_known_model_would_fit_into_the_catalogue() -> None:
    names = [name for model in known_models() for name in (model.id, model.repo)]
    assert len(names) == len(set(names))
    assert len(known_models()) >= 16
    for model in known_models():
        Base(id=model.id, source=f"hub:{model.repo}@{'a' * 40}", aliases=(model.repo,))
        assert not set(names) & {name for base in load_catalogue(BUILT_IN).bases for name in (base.id, *base.aliases)}


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "qwen/qwen2.5-0.5b-INSTRUCT"])
def test_whoever_asks_for_one_is_told_how_to_have_it(name: str) -> None:
    model = known_model(name)
    assert model is not None
    assert model.repo == "Qwen/Qwen2.5-0.5B-Instruct"
    with pytest.raises(NotFound, match=r"tunesmith models add qwen2\.5-0\.5b-instruct"):
        load_catalogue().get(name)
    assert known_model("qwen") is None
