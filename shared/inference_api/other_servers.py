"""What clients of other servers send beside OpenAI's own fields, each with what becomes of it here and why.

`Ignored` fields are taken and named in a header, `Only` fields refused by name unless they ask for nothing. What is
done has its field in the dialect's own body.
"""

from typing import Annotated, Any

from shared.inference_api.fields import Body
from shared.inference_api.ignored import Ignored, Only

_CACHE = Ignored("prompts are not cached by name")
_ACCOUNT = Ignored("it concerns the client's account and does not change the answer")
_KEPT = Ignored("answers are not kept")
_MIROSTAT = Ignored("it counts with mirostat only, which is off")
_DRY = Ignored("it counts with dry_multiplier only, which is 0")
_EXTRA = Ignored("it asks for numbers beside the answer")
_ORDER = Ignored("requests are served in the order in which they come")


class OpenAIFields(Body):
    """Fields of OpenAI's API that its servers need and this one does not."""

    user: Annotated[Any, _ACCOUNT] = None
    safety_identifier: Annotated[Any, _ACCOUNT] = None
    metadata: Annotated[Any, _KEPT] = None
    store: Annotated[Any, _KEPT] = None
    service_tier: Annotated[Any, Ignored("there is one tier")] = None
    prompt_cache_key: Annotated[Any, _CACHE] = None
    prompt_cache_retention: Annotated[Any, _CACHE] = None
    prompt_cache_options: Annotated[Any, _CACHE] = None
    verbosity: Annotated[Any, Ignored("no model here was trained with it")] = None
    prediction: Annotated[Any, Ignored("it makes OpenAI faster and changes no text")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None
    # An empty object asks OpenAI for a search all the same.
    web_search_options: Annotated[Any, Only(unsaid=(None,))] = None


class VllmFields(Body):
    """Fields of vLLM's API; SGLang has many of them too."""

    request_id: Annotated[Any, Ignored("the header x-request-id is read instead")] = None
    priority: Annotated[Any, _ORDER] = None
    cache_salt: Annotated[Any, _CACHE] = None
    include_reasoning: Annotated[Any, Ignored("thoughts are not told apart from the answer")] = None
    separate_reasoning: Annotated[Any, Ignored("thoughts are not told apart from the answer")] = None
    spaces_between_special_tokens: Annotated[Any, Ignored("special tokens are left out of texts")] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    length_penalty: Annotated[Any, Only(1)] = None
    early_stopping: Annotated[Any, Only(False)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    stop_token_ids: Annotated[Any, Only(instead="use stop")] = None
    bad_words: Annotated[Any, Only(instead="use logit_bias")] = None
    allowed_token_ids: Annotated[Any, Only(instead="use logit_bias")] = None
    prompt_logprobs: Annotated[Any, Only(False, instead="use echo with logprobs of /v1/completions")] = None
    return_token_ids: Annotated[Any, Only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False)] = None
    logits_processors: Annotated[Any, Only()] = None
    structured_outputs: Annotated[Any, Only(instead="use response_format")] = None
    structural_tag: Annotated[Any, Only(instead="use response_format")] = None
    guided_json: Annotated[Any, Only(instead="use response_format")] = None
    guided_regex: Annotated[Any, Only(instead="use response_format")] = None
    guided_choice: Annotated[Any, Only(instead="use response_format")] = None
    guided_grammar: Annotated[Any, Only(instead="use response_format")] = None
    guided_decoding_backend: Annotated[Any, Ignored("there is one backend")] = None
    guided_whitespace_pattern: Annotated[Any, Only()] = None
    kv_transfer_params: Annotated[Any, Only()] = None
    mm_processor_kwargs: Annotated[Any, Only()] = None
    media_io_kwargs: Annotated[Any, Only()] = None
    vllm_xargs: Annotated[Any, Only()] = None
    lora_path: Annotated[Any, Only(instead="name the adapter as model")] = None


class VllmChatFields(VllmFields):
    """What vLLM has for chat completions only."""

    add_special_tokens: Annotated[Any, Only(False)] = None
    echo: Annotated[Any, Only(False)] = None
    documents: Annotated[Any, Only()] = None
    chat_template: Annotated[Any, Only(instead="the template is the model's own")] = None


class VllmCompletionFields(VllmFields):
    """What vLLM has for completions only."""

    add_special_tokens: Annotated[Any, Only(True)] = None


class LlamaCppFields(Body):
    """Fields of llama.cpp's server, and of front ends that were made for it."""

    cache_prompt: Annotated[Any, _CACHE] = None
    id_slot: Annotated[Any, _ORDER] = None
    slot_id: Annotated[Any, _ORDER] = None
    timings_per_token: Annotated[Any, _EXTRA] = None
    return_progress: Annotated[Any, _EXTRA] = None
    post_sampling_probs: Annotated[Any, Only(False)] = None
    n_probs: Annotated[Any, Only(0, instead="use logprobs")] = None
    n_predict: Annotated[Any, Only(-1, instead="use max_tokens")] = None
    n_keep: Annotated[Any, Ignored("a prompt that is too long is refused, not cut")] = None
    n_discard: Annotated[Any, Ignored("a prompt that is too long is refused, not cut")] = None
    t_max_predict_ms: Annotated[Any, Only(0, -1)] = None
    repeat_last_n: Annotated[Any, Ignored("it counts with a repetition penalty only, which goes by the whole text")] = (
        None
    )
    penalize_nl: Annotated[Any, Only(True)] = None
    dynatemp_range: Annotated[Any, Only(0)] = None
    dynatemp_exponent: Annotated[Any, Ignored("it counts with dynatemp_range only, which is 0")] = None
    tfs_z: Annotated[Any, Only(1)] = None
    top_a: Annotated[Any, Only(0)] = None
    top_n_sigma: Annotated[Any, Only(0, -1)] = None
    min_keep: Annotated[Any, Only(0, 1)] = None
    mirostat: Annotated[Any, Only(0)] = None
    mirostat_mode: Annotated[Any, Only(0)] = None
    mirostat_tau: Annotated[Any, _MIROSTAT] = None
    mirostat_eta: Annotated[Any, _MIROSTAT] = None
    xtc_probability: Annotated[Any, Only(0)] = None
    xtc_threshold: Annotated[Any, Ignored("it counts with xtc_probability only, which is 0")] = None
    dry_multiplier: Annotated[Any, Only(0)] = None
    dry_base: Annotated[Any, _DRY] = None
    dry_allowed_length: Annotated[Any, _DRY] = None
    dry_penalty_last_n: Annotated[Any, _DRY] = None
    dry_sequence_breakers: Annotated[Any, _DRY] = None
    samplers: Annotated[Any, Only()] = None
    json_schema: Annotated[Any, Only(instead="use response_format")] = None
    image_data: Annotated[Any, Only()] = None
    lora: Annotated[Any, Only(instead="name the adapter as model")] = None
    reasoning_format: Annotated[Any, Ignored("thoughts are not told apart from the answer")] = None
    thinking_forced_open: Annotated[Any, Only(False)] = None


class OllamaFields(Body):
    """Fields of Ollama's API."""

    keep_alive: Annotated[Any, Ignored("the base stays loaded")] = None
    options: Annotated[Any, Only(instead="write its fields beside model")] = None
    format: Annotated[Any, Only(instead="use response_format")] = None
    images: Annotated[Any, Only()] = None
    context: Annotated[Any, Only()] = None
    raw: Annotated[Any, Only(False, instead="use /v1/completions")] = None
    template: Annotated[Any, Only(instead="the template is the model's own")] = None
    system: Annotated[Any, Only(instead="send a message of the role system")] = None
    think: Annotated[Any, Only(False)] = None


class TgiFields(Body):
    """Parameters of text-generation-inference, LoRAX and Hugging Face's pipelines beside those that are done."""

    use_cache: Annotated[Any, Ignored("answers are not cached")] = None
    wait_for_model: Annotated[Any, Ignored("a request always waits for its adapter")] = None
    clean_up_tokenization_spaces: Annotated[Any, Only(False)] = None
    num_return_sequences: Annotated[Any, Only(1)] = None
    max_time: Annotated[Any, Only()] = None
    watermark: Annotated[Any, Only(False)] = None
    merged_adapters: Annotated[Any, Only()] = None
    adapter_parameters: Annotated[Any, Only()] = None
    return_k_alternatives: Annotated[Any, Only(0)] = None
    api_token: Annotated[Any, Only()] = None
