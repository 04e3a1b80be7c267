"""Words in a function's name that denote an action or a question."""

from __future__ import annotations

_ACTIONS = """
abort accept acquire add adapt admit adopt advance allocate allow announce answer append apply approximate arrive ask
assemble assign attach attend await backward barrier become begin bind block_until bound broadcast build cache calculate
call cancel capture cast check choose claim clean clear clip close collect combine commit compare compile complete compose
compress compute concat configure confirm connect consolidate construct consume convert copy count create cut deal decide
declare decode decompress decrypt defer define delete deliver deny deploy dequantize derive describe detach detect
determine disable discard disconnect dispatch divide download drain draw drop dump echo edit embed emit enable encode
encrypt end enqueue ensure enter enumerate escape estimate evaluate exchange exclude execute exit expand expect explain
export extend extract fail fall feed fetch fill filter finalize find finetune finish fit flatten flush fold follow forget
fork format forward free freeze fuse gather generate get give go grow guard guess handle hash hear hide hold identify
ignore import include index_by infer inform inherit init initialise initialize inject insert inspect install interleave
interpret invert iterate join judge keep kill land launch leave lend let limit link listen load locate lock log look lower
main make map mark match materialize measure merge move multiply name_all negotiate normalize notice notify observe offer
open operate optimize order pack pad parse pass patch pause peek perform permute place plan_for poll pop populate post
prepare prefetch pretrain print probe process produce promote protect prove publish pull push put quantize query quote
raise randomize read rebuild receive record recv recover reduce refuse register regroup rehearse reject relay release
reload remember remove rename render reopen repair repeat replace report request require reraise rescale reseed reserve
reset reshape resize resolve respell restart restore resume retain retry return reuse reveal revert rewind rewrite rotate
round route run sample save scale scan scatter schedule seal search see seek select send separate serialize serve set
settle setup shard share shorten show shrink shuffle shut shutdown sign simulate skip sleep slice sort spawn specify split
spread start stop store stream strip submit subtract suggest sum summarize supply suspend swap switch sync synchronize
take talk tell terminate test throw tie tokenize touch trace track train transfer transform translate transpose trim
truncate try turn uninstall unload unpack unpickle unquantize untie unwrap update upload use validate verify visit wait
walk warm warn watch wrap write yield
"""
# The first words of questions (is_, has_) and of the standard forms of conversions and callbacks.
_QUESTIONS = """
is are was has have can could should must may does do did needs wants allows accepts supports contains equals exists
matches fits lacks holds uses starts ends differs belongs takes reads knows looks includes covers to from as on with
"""
# Verbs in the first of several words, otherwise nouns.
_FIRST_OF_SEVERAL = frozenset(
    [
        "accumulate",
        "agree",
        "align",
        "catch",
        "charge",
        "consume",
        "group",
        "list",
        "name",
        "note",
        "pair",
        "penalize",
        "plan",
        "predict",
        "replay",
        "respond",
        "seed",
        "simplify",
        "step",
        "unflatten",
    ]
)
_VERBS = frozenset((_ACTIONS + _QUESTIONS).split())


# In later positions of a name these are usually nouns.
_NOUNS = {"sample", "process", "slice", "record", "index", "block", "order", "bound", "cache"}
_ACTION_WORDS = frozenset(_ACTIONS.split()) - _NOUNS


def has_verb(name: str) -> bool:
    """Whether one of a name's words is a verb in its plain form, or it begins as a question or a conversion does."""
    words = name.strip("_").split("_")
    if len(words) > 1 and words[0] in _FIRST_OF_SEVERAL:
        return True
    return words[0] in _VERBS or any(word in _ACTION_WORDS for word in words[1:])
