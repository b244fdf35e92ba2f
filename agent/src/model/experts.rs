//! Feed-forward blocks of which each token uses a few: which ones (pure), and their sum.
//!
//! A token's experts are added in the order of their numbers, and no expert is ever full: what a token gets does not
//! depend on its company.

use burn::tensor::Tensor;

use super::Error;
use super::config::{self, Scoring};
use super::layers::{Loading, Mlp};
use crate::ops::reference::indices;
use crate::ops::{Format, Linear, Ops, values};

/// The experts of a layer.
#[derive(Debug)]
pub struct Experts {
    rule: config::Experts,
    /// Scores each expert, f32.
    router: Linear,
    /// Counts in choosing and not in weighting, `[experts]`.
    bias: Option<Vec<f32>>,
    experts: Vec<Mlp>,
    /// What every token uses besides.
    shared: Option<Mlp>,
}

impl Experts {
    /// Reads the experts of a layer; `name` is that of the block.
    pub fn load(loading: &Loading<'_>, name: &str, rule: &config::Experts) -> Result<Self, Error> {
        let router =
            loading.linear(Format::F32, &[(&format!("{name}.gate"), rule.count)], loading.config.hidden, false)?;
        let bias = match rule.scoring {
            Scoring::Sigmoid => Some(loading.rows(&format!("{name}.gate.e_score_correction_bias"), &[rule.count])?),
            Scoring::Softmax => None,
        };
        let expert = |i| loading.mlp(&format!("{name}.experts.{i}"), rule.intermediate);
        let experts = (0..rule.count).map(expert).collect::<Result<_, _>>()?;
        let shared = match rule.shared {
            0 => None,
            shared => Some(loading.mlp(&format!("{name}.shared_experts"), shared * rule.intermediate)?),
        };
        Ok(Self { rule: rule.clone(), router, bias, experts, shared })
    }

    /// Computes the block and adds it to `residual`. `x`, `residual`: `[rows, hidden]`.
    pub fn forward_onto(&self, ops: &Ops, x: Tensor<2>, residual: Tensor<2>) -> Tensor<2> {
        let [rows, hidden] = x.dims();
        let logits = values(self.router.forward(x.clone()));
        // For each expert, its rows and their weights.
        let mut users = vec![(Vec::new(), Vec::new()); self.experts.len()];
        for (row, logits) in logits.chunks_exact(self.rule.count).enumerate() {
            for (expert, weight) in choose(&self.rule, self.bias.as_deref(), logits) {
                users[expert].0.push(row);
                users[expert].1.push(weight);
            }
        }
        let mut sum = vec![0.0; rows * hidden];
        for (expert, (users, weights)) in self.experts.iter().zip(&users).filter(|(_, (users, _))| !users.is_empty()) {
            let x = x.clone().select(0, indices(users.iter().copied(), ops.device()));
            let y = values(expert.forward(ops, x));
            for ((row, weight), y) in users.iter().zip(weights).zip(y.chunks_exact(hidden)) {
                sum[row * hidden..][..hidden].iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
            }
        }
        let residual = residual + ops.tensor(sum, [rows, hidden]);
        match &self.shared {
            Some(shared) => shared.forward_onto(ops, x, residual),
            None => residual,
        }
    }

    pub fn bytes(&self) -> usize {
        let shared = self.shared.as_ref().map_or(0, Mlp::bytes);
        self.router.bytes() + shared + self.experts.iter().map(Mlp::bytes).sum::<usize>()
    }
}

/// Chooses a token's experts from the router's logits, `[experts]`; returns them with their weights, by number.
///
/// Sources: DeepSeek-V2 (2024) section 2.2, DeepSeek-V3 (2024) section 2.1.2; the constants as in transformers.
fn choose(rule: &config::Experts, bias: Option<&[f32]>, logits: &[f32]) -> Vec<(usize, f32)> {
    let scores = match rule.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
    };
    let mut ranks = scores.clone();
    if let Some(bias) = bias {
        ranks.iter_mut().zip(bias).for_each(|(rank, bias)| *rank += bias);
    }
    if rule.groups > 1 {
        keep_groups(rule, &mut ranks);
    }
    let mut chosen = largest(&ranks, rule.per_token);
    chosen.sort_unstable();
    let total: f32 = chosen.iter().map(|i| scores[*i]).sum();
    let scale = if rule.normalized { rule.scale / (total + 1e-20) } else { rule.scale };
    chosen.into_iter().map(|i| (i, scores[i] * scale)).collect()
}

/// Leaves only the best groups' experts in the choice.
fn keep_groups(rule: &config::Experts, ranks: &mut [f32]) {
    let size = ranks.len() / rule.groups;
    let count = match rule.scoring {
        Scoring::Softmax => 1,
        Scoring::Sigmoid => 2,
    };
    let best = |group: &[f32]| largest(group, count).into_iter().map(|i| group[i]).sum();
    let groups: Vec<f32> = ranks.chunks_exact(size).map(best).collect();
    let kept = largest(&groups, rule.groups_kept);
    for (group, ranks) in ranks.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            ranks.fill(f32::NEG_INFINITY);
        }
    }
}

/// The indices of the largest, the lowest index among equals; what is no number comes last.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let key = |i: usize| if values[i].is_nan() { f32::NEG_INFINITY } else { values[i] };
    order.sort_by(|a, b| key(*b).total_cmp(&key(*a)));
    order.truncate(count);
    order
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(scoring: Scoring, groups: usize, groups_kept: usize, normalized: bool) -> config::Experts {
        config::Experts::for_tests(4, 2, scoring, groups, groups_kept, normalized, 2.0)
    }
    fn check(got: Vec<(usize, f32)>, expected: &[(usize, f32)]) {
        assert_eq!(got.len(), expected.len(), "{got:?}");
        for (a, b) in got.iter().zip(expected) {
            assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{got:?} {expected:?}");
        }
    }

    #[test]
    fn the_best_are_chosen_and_weighed_by_their_share() {
        let logits = [4.0_f32.ln(), 0.0, 2.0_f32.ln(), 0.0];
        check(choose(&rule(Scoring::Softmax, 1, 1, false), None, &logits), &[(0, 1.0), (2, 0.5)]);
        check(choose(&rule(Scoring::Softmax, 1, 1, true), None, &logits), &[(0, 4.0 / 3.0), (2, 2.0 / 3.0)]);
    }

    #[test]
    fn equals_are_chosen_from_the_first() {
        let chosen = choose(&rule(Scoring::Softmax, 1, 1, false), None, &[0.0; 4]);
        check(chosen, &[(0, 0.5), (1, 0.5)]);
    }

    #[test]
    fn groups_limit_the_choice() {
        // The best and the second best lie in different groups, of which one is kept.
        let logits = [3.0, 0.0, 2.0, 2.0];
        let chosen = |scoring| {
            let chosen = choose(&rule(scoring, 2, 1, false), None, &logits);
            chosen.into_iter().map(|(i, _)| i).collect::<Vec<_>>()
        };
        assert_eq!(chosen(Scoring::Softmax), [0, 1], "by the best of a group");
        assert_eq!(chosen(Scoring::Sigmoid), [2, 3], "by the best two of a group");
    }

    #[test]
    fn a_bias_counts_in_choosing_alone() {
        let chosen = choose(&rule(Scoring::Sigmoid, 1, 1, false), Some(&[0.0, 5.0, 0.0, 0.0]), &[0.0; 4]);
        check(chosen, &[(0, 1.0), (1, 1.0)]);
    }

    #[test]
    fn what_is_no_number_does_not_break_the_choice() {
        let chosen = choose(&rule(Scoring::Softmax, 1, 1, false), None, &[f32::NAN; 4]);
        assert_eq!(chosen.len(), 2);
    }
}
