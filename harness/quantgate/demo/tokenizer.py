"""The demo tokenizer: a byte-level BPE trained on the demo language, with its chat template."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantgate.demo import lexicon as lx
from quantgate.demo.language import TASKS, Sample, messages, sample
from quantgate.demo.lexicon_route import QUEUES

BOS, USER, ASSISTANT, END, PAD = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (PAD, BOS, USER, ASSISTANT, END)
VOCABULARY = 2048
# `<|end|>` closes every turn and is EOS, so a finished answer and a finished text look alike.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only the roles user and assistant exist here, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(samples_per_task: int = 3000) -> PreTrainedTokenizerFast:
    """Train on the training split; every digit stays a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(samples_per_task), trainer)
    # BOS is written by the chat template alone: a post-processor would add it a second time.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def render(made: Sample) -> str:
    """The text that training reads; equal to the chat template's output for conversations."""
    if made.task == "prose":
        return f"{BOS}{made.prompt}{END}"
    turns = [f"<|{m['role']}|>{m['content']}{END}" for m in messages(made)]
    return BOS + "".join(turns)


def _texts(samples_per_task: int) -> Iterable[str]:
    # Words that answers start with are copied from the middle of a sentence; repeating them here
    # makes each one a single token in both places.
    answer_words = (
        *QUEUES,
        *lx.LOOKUP_KEYS,
        *lx.LOOKUP_VALUES,
        *lx.ADJECTIVES,
        *lx.FIRST_NAMES,
        *lx.WEEKDAYS,
        *lx.UNITS,
    )
    for word in answer_words:
        for _ in range(2000):
            yield word
    for task in TASKS:
        for index in range(samples_per_task):
            made = sample(task, "train", index)
            if task == "prose":
                yield made.prompt
            else:
                yield from (message["content"] for message in messages(made))
