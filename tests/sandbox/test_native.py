"""Programs in C++, Java, JavaScript, Rust and Go: right ones, wrong ones, and ones that attack compiler or box."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrl.errors import UserError
from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.languages import LANGUAGES, java_file, java_main, language
from llmrl.sandbox.native import NativeSandbox
from llmrl.verify.code.answers import labelled_program, language_of
from llmrl.verify.code.check import run_tests
from llmrl.verify.code.rows import read_row
from rewards.unit_tests import unit_tests

LIMITS = Limits(cpu_seconds=30, wall_seconds=300.0, memory_mb=256, output_mb=2)
NAMES = [one.labels[0] for one in LANGUAGES]
ROW = {"input_output": {"inputs": ["3 1 2\n", "10 20\n"], "outputs": ["6\n", "30\n"]}}

SUMS = {
    "cpp": "#include <bits/stdc++.h>\nusing namespace std;\nint main(){long s=0,x;while(cin>>x)s+=x;cout<<s<<endl;}",
    "java": "import java.util.*;\nclass Helper { static long add(long a, long b) { return a + b; } }\n"
    "public class Sums {\n  public static void main(String[] args) { Scanner in = new Scanner(System.in); long s = 0;\n"
    "    while (in.hasNextLong()) s = Helper.add(s, in.nextLong()); System.out.println(s); } }",
    "javascript": "const xs = require('fs').readFileSync(0, 'utf8').trim().split(/\\s+/).map(Number);\n"
    "console.log(xs.reduce((a, b) => a + b, 0));",
    "rust": "use std::io::*;\nfn main(){let mut t=String::new();stdin().read_to_string(&mut t).unwrap();"
    'println!("{}",t.split_whitespace().map(|x|x.parse::<i64>().unwrap()).sum::<i64>());}',
    "go": 'package main\nimport ("bufio";"fmt";"os")\nfunc main(){r:=bufio.NewReader(os.Stdin);s:=0\n'
    "for{var x int;if _,e:=fmt.Fscan(r,&x);e!=nil{break};s+=x};fmt.Println(s)}",
}  # fmt: skip
DEEP = {
    "cpp": "#include <cstdio>\n#include <cstdlib>\nlong f(long n){return n?1+f(n-1)*(rand()>=0):0;}\n"
    'int main(){printf("%ld\\n",f(1000000));}',
    "java": "class Main { static long f(long n){return n==0?0:1+f(n-1);}\n"
    "public static void main(String[] a) throws Exception { System.out.println(f(100000)); } }",
    "javascript": "const f = n => n ? 1 + f(n - 1) : 0;\nconsole.log(f(100000));",
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def native(request: pytest.FixtureRequest) -> Iterator[NativeSandbox]:
    try:
        box = NativeSandbox(request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield box
    box.close()


def verdicts(box: NativeSandbox, program: str) -> list[str]:
    return [result.verdict for result in run_tests(program, read_row(ROW), box, LIMITS, stop_early=False)]


@pytest.mark.slow
def test_programs_are_compiled_once_and_judged_by_what_they_print(native: NativeSandbox) -> None:
    right = SUMS[native.language.labels[0]]
    assert verdicts(native, right) == ["passed", "passed"]
    folder = native.prepare(right).folder
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert made and verdicts(native, right) == ["passed", "passed"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == made
    wrong = right.replace("s+=x", "s-=x").replace("a + b", "a - b").replace(".sum::", ".max::")
    wrong = wrong.replace(".max::<i64>()", ".max().unwrap()")
    assert set(verdicts(native, wrong)) == {"wrong"}
    assert verdicts(native, right[:-3]) == ["compile_error"] * 2


@pytest.mark.slow
def test_deep_recursion_works(native: NativeSandbox) -> None:
    name = native.language.labels[0]
    if name not in DEEP:
        pytest.skip("covered by the others")
    end = native.run(DEEP[name], "", LIMITS)
    assert (end.status, end.stdout.strip()) == ("ok", "1000000" if name == "cpp" else "100000"), end.stderr[-500:]


CPP_HOSTILE = {
    "reads files": '#include <fstream>\n#include <iostream>\nint main(){std::ifstream f("/etc/passwd");'
    'std::string s;while(getline(f,s))std::cout<<s;std::cout<<(s.empty()?"none":"6");}',
    "starts processes": '#include <cstdlib>\n#include <unistd.h>\n#include <cstdio>\nint main(){if(fork()>=0)puts("6");'
    'else if(system("echo 6")!=0)puts("none");}',
    "opens a socket": "#include <sys/socket.h>\n#include <cstdio>\nint main(){puts(socket(2,1,0)>=0?"
    '"6":"none");}',
    "writes files": '#include <cstdio>\nint main(){for(auto p:{"x","/tmp/x","/dev/shm/x","/var/tmp/x"})'
    'if(fopen(p,"w")){puts("6");return 0;}puts("none");}',
    "runs for ever": "int main(){for(;;);}",
    "takes all memory": "#include <cstdlib>\n#include <cstring>\nint main(){for(;;){char*p=(char*)malloc(1<<24);"
    "if(!p)return 1;memset(p,1,1<<24);}}",
    "prints without end": "#include <cstdio>\nint main(){for(;;)puts(\"6\");}",
    "exits with success": "#include <cstdlib>\nint main(){_Exit(0);}",
    "remembers earlier inputs": '#include <cstdio>\nint main(){FILE*f=fopen("main","a");puts(f?"6":"none");}',
    "kills everything": "#include <signal.h>\nint main(){kill(-1,9);kill(getppid(),9);}",
    "writes to every descriptor": '#include <unistd.h>\nint main(){for(int i=3;i<99;i++)write(i,"{}",2);}',
    "recurses without end": "int f(int n){volatile char a[4096];a[0]=n;return f(n+1)+a[0];}int main(){return f(0);}",
}  # fmt: skip
CPP_COMPILER = {
    "includes a secret": '#include "/etc/shadow"\nint main(){}',
    "embeds a file": '#include <cstdio>\nextern char s[];int main(){puts(s);}\nasm("s: .incbin \\"/etc/passwd\\"");',
    "never ends": "template<int N> struct A { A<N+1> a; }; template<int N> struct B { static const int v = B<N-1>::v + "
    "B<N-2>::v + sizeof(A<N>); }; int main(){ return B<9999>::v; }",
    "makes a huge file": "int a[1<<28]={1};\nint main(){return a[5];}",
}  # fmt: skip


@pytest.fixture(scope="module", params=["bwrap", "lite"])
def cpp(request: pytest.FixtureRequest) -> Iterator[NativeSandbox]:
    try:
        box = NativeSandbox("cpp", request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield box
    box.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_HOSTILE)
def test_hostile_programs_print_nothing_right(cpp: NativeSandbox, name: str) -> None:
    limits = Limits(cpu_seconds=1, wall_seconds=10.0, memory_mb=256, output_mb=2)
    ends = [cpp.run("#include <unistd.h>\n" + CPP_HOSTILE[name], "3 1 2\n", limits) for _ in range(2)]
    assert all(end.status != "ok" or end.stdout.split() != ["6"] for end in ends), ends
    assert all("root" not in end.stdout for end in ends)
    assert cpp.run(SUMS["cpp"], "3 1 2\n", LIMITS).stdout == "6\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", CPP_COMPILER)
def test_a_source_gets_nothing_out_of_the_compiler(cpp: NativeSandbox, name: str) -> None:
    end = cpp.run(CPP_COMPILER[name], "", LIMITS)
    assert end.status in ("compile_error", "timeout") and "root:" not in end.stdout + end.stderr + end.detail


@pytest.mark.slow
def test_the_reward_takes_the_language_from_its_option_or_from_the_answer() -> None:
    try:
        NativeSandbox("cpp").close()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    answer = f"Here it is:\n```cpp\n{SUMS['cpp']}\n```\nFor example\n```\n3 1 2\n```\n"
    budget = {"wall_seconds": 300.0, "total_seconds": 600.0}
    assert unit_tests(answer, **ROW, code_language="cpp", **budget).reward == 1.0
    assert unit_tests(answer, **ROW, code_language="auto", **budget).reward == 1.0
    assert unit_tests(answer.replace("s+=x", "s=x"), **ROW, code_language="cpp", **budget).reward == 0.0
    assert unit_tests(answer.replace("int main", "int main("), **ROW, code_language="cpp", outcome="bcoder")
    python = "```python\nprint(sum(map(int, input().split())))\n```"
    assert unit_tests(python, **ROW, code_language="auto", **budget).reward == 1.0
    assert unit_tests(answer, test_list=["assert f(1) == 2"], code_language="cpp").reward is None
    with pytest.raises(UserError, match=r"'cobol' is unknown: use one of python, cpp, java"):
        unit_tests(answer, **ROW, code_language="cobol")


def test_names_of_languages() -> None:
    assert language("C++").title == "C++" and language("golang").title == "Go" and language("js").title == "JavaScript"
    text = "```python\nx\n```\n```js\n1\n```\n```\nout\n```"
    assert (language_of(text), language_of("```py\nx\n```"), language_of("text")) == ("javascript", "python", "python")
    assert labelled_program("<think>```cpp\nA\n```</think>\n```C++\nB\n```\n```cpp\nC\n```", "cpp") == "C\n"
    assert labelled_program("int main() {}", "cpp") is None


def test_the_class_of_a_java_program() -> None:
    plain = "class A { int f() { return 1; } }\nclass B { public static void main(String[] x) { } }\nclass C { }"
    assert (java_file(plain), java_main(plain)) == ("Main.java", "B")
    nested = "// public class No\npublic final class P { static class Q { } /* class R { */\n"
    nested += " static void main(String[] x){} }"
    assert (java_file(nested), java_main(nested)) == ("P.java", "P")
    assert java_main('package a.b;\nclass M { String s = "}"; public static void main(String[] x) { } }') == "a.b.M"


def test_nothing_of_a_compiled_program_is_writable_for_the_box(tmp_path: Path) -> None:
    try:
        box = NativeSandbox("cpp")
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    folder = box.prepare(SUMS["cpp"]).folder
    for path in (folder, *folder.iterdir()):
        assert path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o022
    box.close()
    assert not folder.exists()
