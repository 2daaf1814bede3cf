r"""Kinds of answers that a grader gets wrong, each in both directions, with the neighbours that its cure opens.

    python benchmarks/grading_kinds.py          # wrong verdicts by kind, and the pairs that they are about

The left of a pair is the answer in the box, the right is the gold answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hapo_lite.tasks.verify import GraderPool


def matrix(*rows: str, name: str = "pmatrix", between: str = r" \\ ") -> str:
    return rf"\begin{{{name}}} " + between.join(rows) + rf" \end{{{name}}}"


WRONG = {
    "rows of a matrix": [
        (matrix("4", "7"), matrix("5", "6")),
        (matrix("4", "7"), matrix("7", "4")),
        (matrix("3 & 4", "1 & 2"), matrix("1 & 2", "3 & 4")),
        (matrix("1 & 3", "2 & 4"), matrix("1 & 2", "3 & 4")),
        (matrix("1 & 4", "2 & 5", "3 & 6"), matrix("1 & 2 & 3", "4 & 5 & 6")),
        (matrix("1 & 2"), matrix("1", "2")),
        (matrix("4", "7", between=r" \\[2pt] "), matrix("4", "8")),
        (matrix("4", "7", between="\\\\\n"), matrix("4", "8")),
        (matrix("1", "2", name="bmatrix"), matrix("2", "1", name="bmatrix")),
        (r"\left[\begin{array}{cc}3&4\\1&2\end{array}\right]", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"),
        (r"\begin{cases} x=2 \\ y=1\end{cases}", r"\begin{cases} x=1 \\ y=2\end{cases}"),
        (r"\begin{cases} x & x>0 \\ 1 & x<0\end{cases}", r"\begin{cases} 1 & x>0 \\ x & x<0\end{cases}"),
        ("12", matrix("1", "2")),
        ("A^T", "A"),
    ],
    "tiny numbers": [
        ("2^{-2000}", "2^{-2001}"),
        ("1/2006!", "1/2004!"),
        ("10^{-400}", "10^{-401}"),
        ("10^{-400}", "0"),
        (r"\frac{1}{3^{900}}", r"\frac{1}{3^{901}}"),
        ("e^{-1000}", "e^{-1001}"),
    ],
    "compound measures": [
        (r"3\text{ hours }20\text{ minutes}", r"3\text{ hours }25\text{ minutes}"),
        (r"5\text{ ft }6\text{ in}", r"5\text{ ft }8\text{ in}"),
        ("2 hours", "2 hours 15 minutes"),
        ("2", r"2\text{ hours }15\text{ minutes}"),
        ("1 min 5 s", "1 min 6 s"),
        (r"3\text{ lb }4\text{ oz}", r"3\text{ lb }5\text{ oz}"),
        (r"30^\circ 15'", r"30^\circ 45'"),
        ("5 hours 30 minutes", "5.3 hours"),
    ],
    "words that change the value": [
        (r"2:30\text{ am}", r"2:30\text{ pm}"),
        ("2:30 am", "2:30"),
        (r"2\text{ or more}", r"2\text{ or less}"),
        ("3 or fewer", "3"),
        ("18 or more", "18 eggs"),
        ("at least 7", "7"),
        ("at most 7", "at least 7"),
        (r"5\text{ loss}", r"5\text{ gain}"),
        (r"5\%\text{ increase}", r"5\%\text{ decrease}"),
        ("15% increase", "15%"),
        (r"8\text{ million}", "8"),
        ("8", r"8\text{ million}"),
        ("3 billion", "3 million"),
        ("5 dozen", "5"),
        ("3 pairs", "3"),
        (r"8\text{ cents}", r"\$8"),
        ("$5", "5 cents"),
        ("20 below zero", "20"),
        ("5 km north", "5 km south"),
        ("100 BC", "100 AD"),
        ("half of 8", "8"),
        ("12 wins", "12 losses"),
        ("10 apples", "10 oranges"),
    ],
    "a letter taken for a unit": [
        *[("6", f"6{letter}") for letter in "tmghsdkx"],
        *[(f"6{letter}", "6") for letter in "tmghsdLn"],
        ("2m", "2h"),
        ("7b", "7c"),
        ("x", "6x"),
        (r"7\text{ g}", r"7\text{ kg}"),
        (r"\frac{1}{3}", r"\frac{1}{3}ml^2"),
    ],
    "units": [
        (r"5\text{ cm^2}", r"5\text{ cm^3}"),
        (r"5\text{ square cm}", r"5\text{ cubic cm}"),
        (r"8\text{ m}^2", r"8\text{ m}"),
        ("9 in^2", "9 in^3"),
        ("8 sq ft", "8 cubic ft"),
        (r"9\text{ m/s}", r"9\text{ m/s}^2"),
        ("5 cm", "5 m"),
        ("5 km/h", "5 m/s"),
    ],
    "a tuple is no set": [
        ("(1,2)", r"\{1,2\}"),
        (r"\{1,2\}", "(1,2)"),
        ("(2,1)", "x=1, y=2"),
        ("x=2,y=1", "(1,2)"),
        ("(y,x)=(1,2)", "(x,y)=(1,2)"),
        ("(3,4,5)", r"\{3,4,5\}"),
        (r"\{\{1\},\{2\}\}", r"\{1,2\}"),
        (r"\{(1,2)\}", r"\{(2,1)\}"),
        ("(1,2),(3,4)", "(1,4),(3,2)"),
        ("(1,2)", "[1,2]"),
        ("7,7,2", "7,2,2"),
        (r"5, 5\text{ cm}^{4}", r"5, 5\text{ cm}^{3}"),
    ],
    "near 1": [
        ("(2^{60}-1)/2^{60}", "(2^{60}+1)/2^{60}"),
        ("1-10^{-20}", "1"),
        ("1+10^{-12}", "1"),
        ("0.9999999999", "1"),
        (r"\frac{999999999999}{10^{12}}", "1"),
        (r"\sqrt{1+10^{-30}}", "1"),
    ],
    "equations": [
        ("x+y=2", "x+y=1"),
        ("x=2", "x^2=4"),
        ("x^2=9", "x=3"),
        ("2x+4y=6", "x+2y=4"),
        ("x^2-y^2=1", "y^2-x^2=1"),
        ("(x-1)^2+(y+2)^2=25", "(x+1)^2+(y-2)^2=25"),
        ("y=5", "x=5"),
        ("y=2x", "y=2x+1"),
        ("x'+1", "x+1"),
        ("y''=y", "y'=y"),
    ],
    "large numbers": [("2^{1024}", "4^{511}"), ("10^{400}", "10^{401}"), ("3^{700}", "9^{351}"), ("100!", "101!")],
    "magnitudes": [("7000000", "8 million"), ("80", "8 thousand"), ("8", "8 dozen"), (r"\$2\text{ million}", "2000")],
    "letters of any sign": [
        (r"\sqrt{a+b}", r"\sqrt a+\sqrt b"),
        (r"\ln(a+b)", r"\ln a+\ln b"),
        (r"\ln(a)^2", r"2\ln a"),
        (r"\sqrt{x^2}", "x"),
        ("|x|", "x"),
        (r"\lfloor x\rfloor", "x"),
        ("(x+1)^{1000}+1", "(x+1)^{1000}"),
    ],
    "degrees": [
        (r"\sin 30", "1/2"),
        (r"\cos 60^\circ", r"\frac{\sqrt3}{2}"),
        ("45", r"\sin 45^\circ"),
        (r"45^\circ", r"54^\circ"),
        (r"20^\circ\text{C}", r"20^\circ\text{F}"),
    ],
    "the imaginary unit": [("(1+i)^2", "-2i"), ("1/i", "i"), ("i^3", "i"), ("3+4i", "3-4i"), ("2i", "2")],
    "plus-minus": [
        ("4", r"\pm4"),
        (r"\pm4", "4"),
        (r"\frac{3+\sqrt5}{2}", r"\frac{3\pm\sqrt5}{2}"),
        (r"\frac{3\pm\sqrt5}{2}", r"\frac{3\pm\sqrt7}{2}"),
        (r"x=\pm 2", "x=2"),
    ],
    "decimals": [
        ("0.33", "1/3"),
        ("0.3333", "1/3"),
        (r"3.03\times10^{-2}", "1/33"),
        ("0.66666", "2/3"),
        ("3.4", "3,4"),
        ("3,4", "3.4"),
        ("1.41421", r"\sqrt2"),
    ],
    "mixed numbers": [("21/4", "2.25"), ("2 1/4", "2.5"), ("3 1/2", "31/2"), (r"1\frac12", "11/2"), ("3(2)", "5")],
    "several solutions": [
        ("p=5,q=7", "p=7,q=5"),
        ("p=7,q=2", r"p=7,q=2 \text{ and } p=5,q=2"),
        ("x=1,y=2; x=3,y=4", "x=1,y=4; x=3,y=2"),
        ("x=1,y=2 or x=2,y=1", "x=1,y=2"),
        (r"\text{seat}, \text{north}", r"\text{east}, \text{north}"),
    ],
    "inequalities": [
        ("x<3", "x>3"),
        ("x>3", r"[3,\infty)"),
        (r"x\ge3", r"(3,\infty)"),
        ("-1<x<4", "[-1,4)"),
        ("x<-1 or x>4", "(-1,4)"),
        ("-x<3", "x<3"),
        ("x>2", "y>2"),
        ("x>2", "2"),
        (r"(3,-\infty)", "x>3"),
        ("[1,2)", "(1,2]"),
        (r"x\ne 3, x\ne 5", r"x\ne 1, x\ne 2"),
        (r"x\ne 3, x\ne 5", r"x\ne 3"),
    ],
    "Unicode": [
        ("⅓", "1/2"),
        ("√3", "√2"),
        ("x³", "x^2"),
        ("10⁴", "10^3"),
        ("x≥4", r"x\le4"),
        ("2²", "22"),
        ("−5", "5"),
    ],
    "times and ratios": [("3:20", "6:40"), ("9:15", "9:51"), ("2:3", "3:2"), ("1:2:3", "2:4:5"), ("12:30", "12:00")],
    "as it was": [
        (r"3\pmod 5", r"3\pmod 7"),
        ("3", r"3\pmod 7"),
        ("12_9", "12_8"),
        (r"2\cdot3", "6"),
        ("2(3)", "6"),
        ("50%", "0.05"),
        ("50%", "50 cm"),
    ],
}

RIGHT = {
    "rows of a matrix": [
        (r"\begin{pmatrix}5\\6\end{pmatrix}", matrix("5", "6")),
        (matrix("5", "6", name="bmatrix"), matrix("5", "6")),
        (matrix("0.5", "1"), matrix(r"\frac12", "1")),
        (matrix("1", "2", between="\\\\\n"), matrix("1", "2")),
        (matrix("1", "2", between=r"\\[2pt]"), matrix("1", "2")),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", matrix("1 & 2", "3 & 4")),
        (matrix("x+1", "2"), matrix("1+x", "2")),
        (r"\frac12" + matrix("2", "4"), matrix("1", "2")),
        (r"\begin{cases}y=2\\x=1\end{cases}", "x=1,y=2"),
    ],
    "equations": [
        ("2x+4y=6", "x+2y=3"),
        ("x^2+y^2-4=0", "x^2+y^2=4"),
        ("(x-1)^2+(y-2)^2=25", "x^2-2x+y^2-4y=20"),
        (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"),
        ("-x-y=-3", "x+y=3"),
        ("y=mx+b", "mx-y+b=0"),
        ("2y=4x+6", "y=2x+3"),
        ("LRAC=SRAC", "SRAC=LRAC"),
    ],
    "large numbers": [
        ("2^{1024}", "4^{512}"),
        ("3^{1000}", "9^{500}"),
        ("10^{400}", "(10^{200})^2"),
        ("2^{-2000}", "4^{-1000}"),
        ("10^{-400}", "100^{-200}"),
    ],
    "units": [
        ("7 dollars", "7"),
        ("8 weeks", "8"),
        ("8 people", "8"),
        ("8 years old", "8"),
        ("24 cm^2", "24"),
        ("8 m/s", "8"),
        ("15 km/h", "15"),
        ("20 miles per hour", "20"),
        ("18", "18 eggs"),
        ("18", r"18\text{ eggs}"),
        ("10cm", "10"),
        ("40 marbles", "40"),
        ("12 square feet", "12"),
        (r"9.8\,\mathrm{m/s^2}", "9.8"),
        (r"\text{5 cm}", "5"),
        ("5 red marbles", "5"),
        ("5th", "5"),
        ("8 dollars", r"\$8"),
        ("36 sq cm", r"36\text{ cm}^2"),
        ("80 minutes", "1 hour 20 minutes"),
        ("3 hours and 20 minutes", r"3\text{ hours }20\text{ minutes}"),
        ("200 cents", r"\$2"),
        ("2:30 p.m.", "2:30 PM"),
    ],
    "magnitudes": [
        ("8000000", r"8\text{ million}"),
        ("2.5 million", "2500000"),
        ("3 billion", "3,000,000,000"),
        ("60", "5 dozen"),
        (r"\$1.5\text{ million}", r"\$1,500,000"),
    ],
    "letters of any sign": [
        (r"\sqrt{a/b}", r"\sqrt a/\sqrt b"),
        (r"\ln(ab)", r"\ln a+\ln b"),
        (r"\sqrt{ab}", r"\sqrt a\sqrt b"),
        (r"\ln(x/y)", r"\ln x-\ln y"),
        (r"\sqrt{4a}", r"2\sqrt a"),
        (r"\frac{1}{\sqrt{x}}", r"\frac{\sqrt x}{x}"),
    ],
    "degrees": [
        (r"\sin 30^\circ", "1/2"),
        ("45°", "45"),
        (r"\cos^2 30^\circ", r"\frac34"),
        (r"2\sin 45^\circ", r"\sqrt2"),
        ("120 degrees", r"120^\circ"),
    ],
    "the imaginary unit": [
        ("(1+i)^2", "2i"),
        ("1/i", "-i"),
        ("i^2", "-1"),
        (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
        (r"e^{i\pi}", "-1"),
    ],
    "plus-minus": [
        (r"\frac{3\pm\sqrt5}{2}", r"\frac{3+\sqrt5}{2}, \frac{3-\sqrt5}{2}"),
        (r"\frac{3\pm\sqrt{5}}{2}", r"\frac{3}{2}\pm\frac{\sqrt5}{2}"),
        (r"(\pm1,2)", "(1,2),(-1,2)"),
        (r"\{\pm 2\}", r"\{2,-2\}"),
        ("x=2,x=-2", r"x=\pm2"),
    ],
    "decimals": [
        (r"3.0303030303\times10^{-2}", "1/33"),
        ("0.142857142857", "1/7"),
        ("0.090909", "1/11"),
        ("66.666667", "200/3"),
        ("3.14159265", r"\pi"),
        (r"0.\overline{3}", "1/3"),
    ],
    "mixed numbers": [("2 1/4", "2.25"), (r"3\frac12", "7/2"), ("-2 1/2", "-2.5"), ("2½", "2.5"), ("10 1/10", "10.1")],
    "several solutions": [
        (r"p=7,q=2 \text{ and } p=5,q=2", "p=5,q=2; p=7,q=2"),
        ("q=2,p=7", "p=7,q=2"),
        ("(x,y)=(1,2) or (3,4)", "(1,2),(3,4)"),
        (r"a=1,b=2 \text{ or } a=3,b=4", "(1,2),(3,4)"),
        ("x=1 or x=2", "1,2"),
        ("(1,2)(3,4)", "(3,4),(1,2)"),
        ("4", "4,4"),
    ],
    "inequalities": [
        ("x>3", r"(3,\infty)"),
        (r"-1\le x<4", "[-1,4)"),
        (r"4>x\ge-1", r"-1\le x<4"),
        ("3<x", r"(3,\infty)"),
        (r"x<1\text{ or }x>4", r"(4,\infty)\cup(-\infty,1)"),
        (r"x\ge 1 and x<4", "[1,4)"),
        (r"x \neq 5", r"(-\infty,5)\cup(5,\infty)"),
        ("(-3,3)", "|x|<3"),
        (r"[1,2]\cup[2,3]", "[1,3]"),
        ("2a<2b", "b>a"),
        (r"\mathbb{R}", r"(-\infty,\infty)"),
    ],
    "Unicode": [
        ("½", r"\frac12"),
        ("√2", r"\sqrt2"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("x²", "x^2"),
        ("10³", "10^3"),
        ("10⁻³", "10^{-3}"),
        ("∞", r"\infty"),
        ("1⁄2", "1/2"),
        ("2·3^5", r"2\cdot 3^5"),
        ("45°", r"45^\circ"),
        ("x≤2", r"x\le2"),
        ("[0,1]∪[2,3]", r"[0,1]\cup[2,3]"),
        ("±3", r"\pm3"),
    ],
    "as it was": [
        ("10%", "0.1"),
        ("10", "10%"),
        ("1,2", "(1,2)"),
        ("2,1", "1,2"),
        ("[1,2,3]", "(1,2,3)"),
        ("4:6", "2:3"),
        ("2/3", "2:3"),
        ("52", "52_8"),
        ("2x+1", "y=2x+1"),
        ("(1,2)", "x=1,y=2"),
        ("3,400", "3400"),
        ("m+n=12", "12"),
        (r"\emptyset", r"\{\}"),
    ],
}


def main() -> None:
    print("| kind | wrong answers | taken as right | right answers | refused |\n|---|---|---|---|---|")
    lines = []
    with GraderPool(workers=2, timeout_s=20) as pool:
        for kind in dict.fromkeys([*WRONG, *RIGHT]):
            cells = []
            for pairs, right in ((WRONG.get(kind, []), False), (RIGHT.get(kind, []), True)):
                grades = pool.grade_many([(rf"Therefore \boxed{{{answer}}}.", gold) for answer, gold in pairs])
                missed = [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct != right]
                cells += [str(len(pairs)), str(len(missed))] if pairs else ["", ""]
                lines += [f"{kind}: {a} / {g} is {'wrong' if right else 'right'}" for a, g in missed]
            print(f"| {kind} | " + " | ".join(cells) + " |")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
