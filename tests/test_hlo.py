"""benchmarks/hlo.py reads what XLA writes: of toy functions compiled here, and of TPU's dialect."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

# Lines of programs compiled for v5e by libtpu 0.0.42 (toy functions), shortened where "..." stands.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%fused_computation.5 (param_0.18: bf16[16,8,8,32], param_1.16: bf16[16,8,8,64]) -> f32[3,3,64,32] {
  %param_1.16 = bf16[16,8,8,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %param_0.18 = bf16[16,8,8,32]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convolution.12 = f32[3,3,64,32]{3,2,1,0:T(8,128)S(1)} convolution(%param_1.16, %param_0.18), window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, metadata={op_name="jit(f)/transpose(jvp())/conv_general_dilated" stack_frame_id=3}
}

%fused_computation.1 (param_0.31: f32[16,8], param_1.24: f32[8,4]) -> f32[16,4] {
  %param_0.31 = f32[16,8]{1,0:T(8,128)} parameter(0)
  %param_1.24 = f32[8,4]{1,0:T(8,128)} parameter(1)
  ROOT %convolution.9 = f32[16,4]{1,0:T(8,128)} convolution(%param_0.31, %param_1.24), dim_labels=bf_io->bf, operand_precision={highest,highest}, metadata={op_name="jit(f)/bhwc,cd->bhwd/dot_general" stack_frame_id=6}
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %input = f32[64]{0:T(128)} parameter(0)
  %all-reduce.7 = f32[64]{0:T(128)} all-reduce(%input), channel_id=3, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16]{0:T(128)} dynamic-slice(%all-reduce.7, %zero), dynamic_slice_sizes={16}
}

ENTRY %main.0_spmd (param.1: f32[3,3,64,32]) -> (f32[3,3,64,32]) {
  %all-reduce = (f32[3,3]{1,0:T(8,128)}, bf16[5]{0:T(256)}, /*index=2*/f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=1, to_apply=%add.clone
  %all-gather-start = (f32[2]{0:T(128)}, f32[8]{0:T(128)}) all-gather-start(%d), dimensions={0}
  %all-gather-done = f32[8]{0:T(128)} all-gather-done(%all-gather-start)
  %reduce-scatter.2 = f32[4]{0:T(128)} reduce-scatter(%e), dimensions={0}
  %transpose.4 = f32[4,2]{0,1:T(8,128)} transpose(%f), dimensions={1,0}
  %custom-call.1 = (f64[2]{0}) custom-call(%g), custom_call_target="xla_python_cpu_callback"
}
"""  # noqa: E501


def compile_text(function, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_bytes_of_a_type_are_its_arrays_without_layouts():
    # 2 * 3 floats, 5 bfloat16s, one flag, one integer.
    text = "(f32[2,3]{1,0:T(8,128)}, bf16[5]{0:T(256)(2,1)}, pred[], /*index=3*/s32[]{:T(128)})"
    assert hlo.num_bytes(text) == 24 + 10 + 1 + 4


def test_collectives_are_counted_with_the_size_of_the_whole_array():
    # all-reduce: 9 floats, 5 bfloat16s, 1 float. all-gather: what comes out, 8 floats. Scattered:
    # 64 floats in the fusion, and 4 parts of 4 floats.
    found = hlo.collectives(TPU)
    assert found == {
        "all-reduce": {"count": 1, "bytes": 36 + 10 + 4, "largest": 50, "looped": 0},
        "reduce-scatter": {"count": 2, "bytes": 256 + 64, "largest": 256, "looped": 0},
        "all-gather": {"count": 1, "bytes": 32, "largest": 32, "looped": 0},
    }


def test_what_travels_in_a_function_that_a_loops_body_calls_is_looped():
    text = """
%inner (a: f32[3]) -> f32[3] {
  ROOT %all-reduce.1 = f32[3]{0} all-reduce(%a), to_apply=%add
}

%body (b: f32[3]) -> f32[3] {
  ROOT %call.1 = f32[3]{0} call(%b), to_apply=%inner
}

ENTRY %main (c: f32[3]) -> f32[3] {
  %all-reduce.2 = f32[5]{0} all-reduce(%c), to_apply=%add
  ROOT %while.1 = f32[3]{0} while(%c), condition=%cond, body=%body
}
"""
    expected = {"count": 2, "bytes": 12 + 20, "largest": 20, "looped": 12}
    assert hlo.collectives(text) == {"all-reduce": expected}


def test_a_product_is_bfloat16_only_where_both_factors_are():
    network, dense = hlo.products(TPU)
    assert (network["dtype"], network["primitive"]) == ("bfloat16", "conv_general_dilated")
    assert (dense["dtype"], dense["primitive"]) == ("float32", "dot_general")
    assert (network["highest"], dense["highest"]) == (False, True)
    # A kernel's gradient sums over 16 images of 8 x 8; a matrix product over 8.
    assert network["flops"] == 2 * (3 * 3 * 64 * 32) * (16 * 8 * 8)
    assert dense["flops"] == 2 * 16 * 4 * 8


def test_a_collective_in_a_compiled_scan_is_looped():
    # One device needs no collective, so the text of a scan stands in: what it calls is in the loop.
    text = compile_text(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, 3)[0], (4, 4))
    listed = list(hlo.instructions(text))
    (product,) = (i for i in listed if i.opcode in ("dot", "convolution"))
    assert product.computation in hlo._in_loops(listed)


def test_callbacks_transposes_and_float64_are_counted():
    assert hlo.count(TPU) == {"transposes": 1, "copies": 0, "host_callbacks": 1, "float64": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_of_a_compiled_convolution_are_those_of_the_formula(dtype):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    text = compile_text(convolve, (2, 8, 8, 4), (3, 3, 4, 16), dtype=dtype)
    (product,) = hlo.products(text)
    assert product["flops"] == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 4)


def test_flops_of_a_compiled_matrix_product_are_those_of_the_formula():
    (product,) = hlo.products(compile_text(jnp.matmul, (3, 40), (40, 50)))
    assert product["flops"] == 2 * 3 * 40 * 50
    assert product["dtype"] == "float32"


def test_a_callback_of_a_compiled_program_is_seen():
    def call(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    assert hlo.count(compile_text(call, (3,)))["host_callbacks"] == 1
    assert hlo.count(compile_text(lambda x: x + 1, (3,)))["host_callbacks"] == 0
