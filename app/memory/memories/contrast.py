"""
Words that exclude each other: `bought` and `sold`, `sister` and `brother`.

An embedding places two statements that differ in one of these next to each other, as close as two that say the same in
other words. So a comparison by meaning needs this table. It is English, and it is not complete. Negative words, such as
`hates`, are not in it: the write gate compares negations.
"""

from __future__ import annotations

#: A contrast a line; its sides are between bars, and words of one side mean the same here.
_TABLE = """
buy buys buying bought purchase purchased acquire acquired | sell sells selling sold | rent rents rented lease leased
start starts started starting begin begins began join joins joined open opens opened |
    end ends ended ending stop stops stopped finish finishes finished leave leaves left quit quits close closes closed
learn learns learning learnt learned study studies studying studied | teach teaches teaching taught
move moves moved arrive arrives arrived come comes came | leave leaves left depart departed
win wins won | lose loses lost
lend lends lent | borrow borrows borrowed
give gives gave given send sends sent | take takes took receive receives received get gets got
like likes love loves enjoy enjoys | allergic allergy
increase increases increased raise raises raised grow grows grew |
    decrease decreases decreased reduce reduces reduced lower lowered shrink
add adds added | remove removes removed delete deletes deleted
accept accepts accepted approve approved | reject rejects rejected refuse refuses refused decline declined
enable enables enabled | disable disables disabled
pass passes passed succeed succeeds succeeded | fail fails failed
hire hires hired | fire fires fired
marry marries married | divorce divorced | engaged
on | off
up | down
in into inside | out outside
before | after
above over | below under
more most | less least fewer
first | second | third | last
old older | new newer | young younger
long longer | short shorter brief briefer
big bigger large larger | small smaller little
high higher | low lower
fast faster quick quicker | slow slower
hot hotter warm warmer | cold colder cool
cheap cheaper | expensive dear
early earlier | late later
left | right
good better well healthy | bad worse ill sick
public | private
daily | weekly | monthly | yearly
morning mornings | noon | afternoon afternoons | evening evenings | night nights
spring | summer summers | autumn fall | winter winters
monday mondays | tuesday tuesdays | wednesday wednesdays | thursday thursdays | friday fridays |
    saturday saturdays | sunday sundays
january | february | march | april | may | june | july | august | september | october | november | december
mother mum mom | father dad | sister | brother | son | daughter | wife | husband | aunt | uncle | niece | nephew |
    cousin | grandmother | grandfather | friend | boss | colleague | neighbour neighbor
cat cats | dog dogs | bird birds | horse horses | fish | rabbit rabbits
tea | coffee | water | beer | wine | milk | juice
red | green | blue | yellow | black | white | orange | purple | pink | brown | grey gray
north | south | east | west
one | two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
"""

#: Contrasts: the words of each side of each.
CONTRASTS: tuple[tuple[frozenset[str], ...], ...] = tuple(
    tuple(frozenset(side.split()) for side in line.split("|"))
    for line in _TABLE.replace("|\n", "|").strip().splitlines()
)


def is_contrary(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two statements have different sides of a contrast; each is given as its words in lower case."""
    for sides in CONTRASTS:
        first = {place for place, words in enumerate(sides) if words & one}
        second = {place for place, words in enumerate(sides) if words & other}
        if first and second and first != second:
            return True
    return False
