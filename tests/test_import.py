"""What `import wush_compile` imports, and what it leaves for the first use."""

import subprocess
import sys

import wush_compile as wc


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_alone_it_imports_neither_torch_nor_transformers():
    assert run("import wush_compile, sys; print({'torch', 'transformers', 'rich'} & set(sys.modules))") == "set()"


def test_with_torch_it_gives_the_ops_and_imports_nothing_for_people():
    code = (
        "import torch, wush_compile, sys; torch.ops.wush.fp4_linear; print({'transformers', 'rich'} & set(sys.modules))"
    )
    assert run(code) == "set()"


def test_before_transformers_it_registers_the_quantization_method():
    code = """
import wush_compile, torch, transformers
torch.ops.wush.fp4_linear
transformers.LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["wush"].__name__)
"""
    assert run(code) == "WushHfQuantizer"


def test_every_public_name_is_there():
    assert set(wc.__all__) <= set(dir(wc))
    for name in wc.__all__:
        assert getattr(wc, name).__name__.rpartition(".")[2] in (name, "evaluation")


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(wc, "quantise")
