//! Questions with known answers for a device: a product of matrices, and patterns written to its memory and read back.
//!
//! All numbers are integers that f32 holds exactly, and so are all sums of them in any order, so an answer is right to the
//! bit or wrong: no tolerance. Factors are below 2^3 and fit f16 and TF32 as well, and 512 products of them stay below
//! 2^24 (IEEE 754: binary32 has 24 bits).

use burn::tensor::Device as Tensors;
use izar_common::wire::agent::Device;

use super::cuda::Error;
use super::{Ops, Path, tensor, values};
use crate::probe::Answer;

/// Rows, columns and inner length of the product.
const SIDE: usize = 512;

/// Numbers of a pattern: 64 MiB.
const NUMBERS: usize = 16 << 20;

/// Spreads neighbours over all bits: the golden ratio of 2^32 (Knuth, TAOCP 3, 6.4).
const SPREAD: u32 = 0x9e37_79b9;

/// Asks a device.
pub fn ask(device: Device) -> Answer {
    let ops = match device {
        Device::Cpu => Ok(Ops::cpu(Path::Reference)),
        Device::Cuda(index) => Ops::cuda(index),
    };
    match ops {
        Ok(ops) => match product(ops.device()).and_then(|()| memory(ops.device(), NUMBERS)) {
            Ok(()) => Answer::Right,
            Err(why) => Answer::Wrong(why),
        },
        Err(error @ (Error::NotBuilt(_) | Error::NoCompiler(_) | Error::NoHeaders { .. })) => {
            Answer::Skipped(error.to_string())
        }
        Err(error @ (Error::NoDriver(_) | Error::NoCard { .. })) => Answer::Silent(error.to_string()),
    }
}

/// A whole number between -7 and 7.
fn factor(at: usize) -> f32 {
    ((at as u32).wrapping_mul(SPREAD) >> 16) as i32 as f32 % 15.0 - 7.0
}

/// Multiplies two matrices and compares with whole numbers.
fn product(device: &Tensors) -> Result<(), String> {
    let a: Vec<f32> = (0..SIDE * SIDE).map(factor).collect();
    let b: Vec<f32> = (0..SIDE * SIDE).map(|at| factor(at + SIDE * SIDE)).collect();
    let left = tensor(a.clone(), [SIDE, SIDE], device);
    let given = values(left.matmul(tensor(b.clone(), [SIDE, SIDE], device)));
    let mut known = vec![0_i32; SIDE * SIDE];
    for (row, out) in known.chunks_exact_mut(SIDE).enumerate() {
        for inner in 0..SIDE {
            let factor = a[row * SIDE + inner] as i32;
            for (out, b) in out.iter_mut().zip(&b[inner * SIDE..]) {
                *out += factor * *b as i32;
            }
        }
    }
    compare("product", &given, known.into_iter().map(|known| known as f32))
}

/// Writes a pattern and its complement to the device's memory, and reads what is there, doubled by the device.
fn memory(device: &Tensors, numbers: usize) -> Result<(), String> {
    const BITS: u32 = (1 << 23) - 1;
    for flip in [0, BITS] {
        let number = |at: usize| ((((at as u32).wrapping_mul(SPREAD) >> 9) ^ flip) & BITS) as f32;
        let pattern: Vec<f32> = (0..numbers).map(number).collect();
        let given = values(tensor(pattern, [numbers], device).mul_scalar(2.0));
        compare("memory", &given, (0..numbers).map(|at| 2.0 * number(at)))?;
    }
    Ok(())
}

fn compare(what: &str, given: &[f32], known: impl Iterator<Item = f32>) -> Result<(), String> {
    let mut wrong = given.iter().zip(known).enumerate().filter(|(_, (given, known))| **given != *known);
    match wrong.next() {
        None => Ok(()),
        Some((at, (given, known))) => {
            Err(format!("{what}: element {at} is {given} for {known}, and {} more are wrong", wrong.count()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_gives_the_known_answers() {
        let ops = Ops::cpu(Path::Reference);
        assert_eq!(product(ops.device()), Ok(()));
        assert_eq!(memory(ops.device(), 1 << 16), Ok(()));
        let all: Vec<f32> = (0..1000).map(factor).collect();
        assert!(all.iter().all(|x| x.fract() == 0.0 && x.abs() <= 7.0) && all.contains(&-7.0) && all.contains(&7.0));
    }

    #[test]
    fn a_wrong_element_is_found_and_counted() {
        let found = compare("product", &[1.0, 5.0, 3.0, f32::NAN], [1.0, 4.0, 3.0, 2.0].into_iter());
        assert_eq!(found, Err("product: element 1 is 5 for 4, and 1 more are wrong".into()));
    }

    #[test]
    fn a_card_that_this_build_cannot_use_is_skipped_and_one_that_is_not_there_gives_no_answer() {
        let answer = ask(Device::Cuda(999));
        let expected = if cfg!(feature = "cuda") {
            matches!(answer, Answer::Silent(_))
        } else {
            matches!(answer, Answer::Skipped(_))
        };
        assert!(expected, "{answer:?}");
    }
}
