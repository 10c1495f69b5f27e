"""Whether a grammar can be compiled at all, told by a process of its own that can be ended: `python check_grammar.py`.

Some schemas of a few hundred bytes take minutes to compile (intersections of patterns), and nothing in the library ends
that. Reads the grammar from standard input and writes what is wrong with it, nothing if it is good. Imports nothing but
the library, so that it starts in a tenth of a second.
"""

import resource
import sys

from llguidance import LLMatcher, LLParserLimits

CPU_SECONDS, MEMORY = 5, 2 << 30


def limits() -> LLParserLimits:
    """What a grammar may cost: the library's own limits, those of memory and of one step's time made smaller.

    A step's fuel is about 14,000 units a millisecond, its items 20,000; a lexer's state takes 1 to 2 kB.
    """
    return LLParserLimits(
        step_lexer_fuel=100_000,
        step_max_items=30_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def main() -> None:
    """Compile what comes in without a tokenizer, and write the error."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    wrong, messages = LLMatcher.validate_grammar_with_warnings(sys.stdin.read(), limits=limits())
    if wrong:
        sys.stdout.write(messages[0])


if __name__ == "__main__":
    main()
