//! The paths against each other: every operation of the kernels gives what the reference gives.

use super::cpu::tests::{isas, numbers};
use super::*;

fn paths() -> Vec<Ops> {
    isas().map(|isa| Ops::cpu(Path::Kernels(isa))).chain([Ops::cpu(Path::Reference)]).collect()
}

fn near(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1.0_f32, |m, x| m.max(x.abs()));
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * largest, "element {i}: {a} and {b}");
    }
}

/// Runs one computation on every path and compares the results.
fn check(tolerance: f32, run: impl Fn(&Ops) -> Vec<f32>) {
    let expected = run(&Ops::cpu(Path::Reference));
    paths().iter().for_each(|ops| near(&run(ops), &expected, tolerance));
}

/// Three sequences in one step: a beginning, a middle over a border of blocks, and one token.
fn spans() -> Vec<Span> {
    vec![span(0..20, 0, vec![4, 1]), span(20..29, 12, vec![0, 3]), span(29..30, 16, vec![2, 5])]
}

#[test]
fn linear_layers_agree_in_every_format() {
    let (rows, x, bias) = (numbers(40 * 96, 1), numbers(7 * 96, 2), numbers(40, 3));
    // Kernels round activations to 8 bits where weights have 8 or 4.
    for (format, tolerance) in [(Format::F32, 1e-6), (Format::F16, 1e-6), (Format::Int8, 0.01), (Format::Int4, 0.01)] {
        check(tolerance, |ops| {
            let row = |output: usize| Row::F32(&rows[output * 96..][..96]);
            let linear = ops.linear(format, 40, 96, row, Some(bias.clone()), 1);
            let (x, residual) = (ops.tensor(x.clone(), [7, 96]), ops.tensor(numbers(280, 4), [7, 40]));
            let mut out = values(linear.forward(x.clone()));
            out.extend(values(linear.forward_onto(x, residual)));
            out.extend(values(linear.embed(ops, [3, 39, 3].into_iter())));
            out
        });
    }
}

#[test]
fn norms_gates_and_rotations_agree() {
    check(1e-5, |ops| {
        let x = ops.tensor(numbers(30 * 64, 1), [30, 64]);
        let weight = ops.tensor(numbers(64, 2), [64]);
        let plan = ops.plan(spans(), &[0.5, 0.25, 0.125, 0.01], 1.5);
        let turned = x.clone().reshape([30, 8, 8]);
        [
            values(ops.rms_norm(x.clone(), &weight, 1e-5)),
            values(ops.swiglu(x)),
            values(ops.rotate(turned.clone(), &plan, false)),
            values(ops.rotate(turned, &plan, true)),
        ]
        .concat()
    });
}

#[test]
fn grouped_attention_agrees() {
    let shape = Grouped { heads: 6, kv_heads: 2, dim: 12, scale: 0.3 };
    let norms = HeadNorms { q: Arc::new(numbers(12, 7)), k: Arc::new(numbers(12, 8)), epsilon: 1e-6 };
    for format in [CacheFormat::F32, CacheFormat::F16] {
        for norms in [None, Some(&norms)] {
            check(1e-5, |ops| {
                let mut cache = ops.grouped_cache(shape, format, 6);
                let frequencies = [1.0, 0.5, 0.25, 0.1, 0.05, 0.01];
                // What the second and third sequence have already.
                let before = vec![span(0..12, 0, vec![0]), span(12..28, 0, vec![2])];
                let mut run = |spans: Vec<Span>, rows: usize, seed| {
                    let plan = ops.plan(spans, &frequencies, 1.0);
                    let qkv = ops.tensor(numbers(rows * 120, seed), [rows, 120]);
                    values(ops.attend(shape, norms, qkv, &mut cache, &plan))
                };
                [run(before, 28, 1), run(spans(), 30, 2)].concat()
            });
        }
    }
}

#[test]
fn latent_attention_agrees() {
    let shape = Latent { heads: 3, width: 20, rank: 12, scale: 0.3 };
    for format in [CacheFormat::F32, CacheFormat::F16] {
        check(1e-5, |ops| {
            let mut cache = ops.latent_cache(shape, format, 6);
            let before = vec![span(0..12, 0, vec![0]), span(12..28, 0, vec![2])];
            let mut run = |spans: Vec<Span>, rows: usize, seed| {
                let plan = ops.plan(spans, &[1.0], 1.0);
                let queries = ops.tensor(numbers(rows * 60, seed), [rows, 3, 20]);
                let new = ops.tensor(numbers(rows * 20, seed + 1), [rows, 20]);
                values(ops.attend_latent(shape, queries, new, &mut cache, &plan))
            };
            [run(before, 28, 1), run(spans(), 30, 2)].concat()
        });
    }
}

#[test]
fn blocks_are_cleared_and_copied() {
    let shape = Grouped { heads: 1, kv_heads: 1, dim: 2, scale: 1.0 };
    for ops in paths() {
        let mut cache = ops.grouped_cache(shape, CacheFormat::F16, 3);
        let mut run = |change: &dyn Fn(&mut Cache), start: usize, rows: usize, block: u32, qkv: Vec<f32>| {
            change(&mut cache);
            let plan = ops.plan(vec![span(0..rows, start, vec![block])], &[0.0], 1.0);
            values(ops.attend(shape, None, ops.tensor(qkv, [rows, 6]), &mut cache, &plan))
        };
        let first = [0.0, 0.0, 0.0, 0.0, 8.0, -8.0];
        run(&|_| {}, 0, 1, 0, first.into());
        // The second position of a copied block sees the first one's value; a cleared block holds zeros.
        let second = [0.0, 0.0, 0.0, 0.0, 2.0, 2.0];
        near(&run(&|cache| cache.copy(&[(0, 2)]), 1, 1, 2, second.into()), &[5.0, -3.0], 1e-5);
        near(&run(&|cache| cache.clear(&[2]), 1, 1, 2, second.into()), &[1.0, 1.0], 1e-5);
    }
}
