"""lm-eval's `local-completions` on log-likelihoods of given continuations, one by one and in batches."""

import os

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

os.environ["OPENAI_API_KEY"] = os.environ["KEY"]
PAIRS = [("The sky is", " blue"), ("The sky is", " green"), ("One and one are", " two"), ("a", "b")]
requests = [
    Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(PAIRS)
]
found = []
for batch in (1, 3):
    model = LocalCompletionsAPI(
        base_url=f"{os.environ['URL']}/v1/completions",
        model=os.environ["BASE"],
        tokenizer=os.environ["TOKENIZER"],
        tokenizer_backend="huggingface",
        batch_size=batch,
        max_length=256,
    )
    found.append([round(likelihood, 3) for likelihood, _ in model.loglikelihood(requests)])
assert found[0] == found[1], found
assert all(likelihood < 0 for likelihood in found[0])
assert len(set(found[0])) > 1
