//! Layers that decoders are made of, and how they are read from a checkpoint.

use burn::tensor::Tensor;
use izar_common::gguf::GgmlType;
use izar_common::wire::agent::Activations;

use super::config::Config;
use super::weights::Source;
use super::{Error, Options};
use crate::ops::{Format, Linear, Ops, Row};

/// A gated feed-forward block, `down(silu(gate x) * up x)`.
#[derive(Debug)]
pub struct Mlp {
    /// Outputs: gate, then up.
    gate_up: Linear,
    down: Linear,
}

impl Mlp {
    pub fn forward(&self, ops: &Ops, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(ops.swiglu(self.gate_up.forward(x)))
    }
    /// Computes the block and adds it to `residual`.
    pub fn forward_onto(&self, ops: &Ops, x: Tensor<2>, residual: Tensor<2>) -> Tensor<2> {
        self.down.forward_onto(ops.swiglu(self.gate_up.forward(x)), residual)
    }
    pub fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}

/// What reading layers needs.
pub struct Loading<'a> {
    pub config: &'a Config,
    pub source: &'a Source,
    pub options: &'a Options,
    pub ops: Ops,
}

/// Some outputs of a linear layer, as the checkpoint holds them.
enum Part {
    Rows(Vec<f32>),
    /// Blocks of ggml that the format takes over as they are.
    Blocks(GgmlType, Vec<u8>),
}

impl Part {
    fn row(&self, index: usize, inputs: usize) -> Row<'_> {
        match self {
            Self::Rows(rows) => Row::F32(&rows[index * inputs..][..inputs]),
            Self::Blocks(kind, bytes) => {
                let size = inputs / kind.block_elements() as usize * kind.block_bytes() as usize;
                let row = &bytes[index * size..][..size];
                match kind {
                    GgmlType::Q4_0 => Row::Q4_0(row),
                    GgmlType::Q4_1 => Row::Q4_1(row),
                    _ => Row::Q8_0(row),
                }
            }
        }
    }
}

impl Loading<'_> {
    /// Reads a tensor as numbers.
    pub fn rows(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        self.source.rows(self.config, name, shape)
    }
    pub fn vector(&self, name: &str, width: usize) -> Result<Tensor<1>, Error> {
        Ok(self.ops.tensor(self.rows(name, &[width])?, [width]))
    }

    /// Makes a layer of weights in memory, `[outputs, inputs]`.
    pub fn linear_of(&self, format: Format, rows: &[f32], outputs: usize, inputs: usize) -> Linear {
        self.ops.linear(format, outputs, inputs, |output| Row::F32(&rows[output * inputs..][..inputs]), None, 1)
    }

    /// Reads projections with the same input as one layer: their outputs follow each other.
    ///
    /// Where nobody says otherwise, activations have two terms if weights are in int8: their rounding would cost more than
    /// that of the weights.
    pub fn linear(
        &self,
        format: Format,
        projections: &[(&str, usize)],
        inputs: usize,
        biased: bool,
    ) -> Result<Linear, Error> {
        let terms = match (self.options.activations, format) {
            (Activations::Int16, _) | (Activations::Auto, Format::Int8) => 2,
            _ => 1,
        };
        self.layer(format, terms, projections, inputs, biased)
    }

    fn layer(
        &self,
        format: Format,
        terms: usize,
        projections: &[(&str, usize)],
        inputs: usize,
        biased: bool,
    ) -> Result<Linear, Error> {
        let mut parts = Vec::with_capacity(projections.len());
        let mut bias = Vec::new();
        for (name, outputs) in projections {
            parts.push((*outputs, self.part(format, &format!("{name}.weight"), *outputs, inputs)?));
            if biased {
                bias.extend(self.rows(&format!("{name}.bias"), &[*outputs])?);
            }
        }
        let row = |mut output: usize| {
            for (outputs, part) in &parts {
                match output.checked_sub(*outputs) {
                    Some(rest) => output = rest,
                    None => return part.row(output, inputs),
                }
            }
            unreachable!("an output belongs to a projection")
        };
        let total = projections.iter().map(|(_, outputs)| outputs).sum();
        Ok(self.ops.linear(format, total, inputs, row, biased.then_some(bias), terms))
    }

    /// Reads a table of tokens: the embedding or the output layer. Rounding errors in these two weigh most: one is where
    /// everything begins, the other decides between tokens. So int4 keeps them in int8, but for a checkpoint that has
    /// rounded them itself, and activations have two terms.
    pub fn table(&self, name: &str) -> Result<Linear, Error> {
        let (config, mut format) = (self.config, self.options.format);
        let shape = [config.vocabulary, config.hidden];
        if format == Format::Int4 {
            let blocks = self.source.blocks(config, &format!("{name}.weight"), &shape)?;
            let rounded = blocks.is_some_and(|blocks| matches!(blocks.kind, GgmlType::Q4_0 | GgmlType::Q4_1));
            format = if rounded { Format::Int4 } else { Format::Int8 };
        }
        self.layer(format, 2, &[(name, config.vocabulary)], config.hidden, false)
    }

    fn part(&self, format: Format, name: &str, outputs: usize, inputs: usize) -> Result<Part, Error> {
        let shape = [outputs, inputs];
        if matches!(format, Format::Int8 | Format::Int4)
            && let Some(blocks) = self.source.blocks(self.config, name, &shape)?
        {
            match (format, blocks.kind) {
                (Format::Int4, GgmlType::Q4_0 | GgmlType::Q4_1) | (Format::Int8, GgmlType::Q8_0) => {
                    return Ok(Part::Blocks(blocks.kind, blocks.bytes));
                }
                _ => {}
            }
        }
        Ok(Part::Rows(self.rows(name, &shape)?))
    }

    /// Reads a feed-forward block.
    pub fn mlp(&self, name: &str, intermediate: usize) -> Result<Mlp, Error> {
        let (hidden, format) = (self.config.hidden, self.options.format);
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|part| format!("{name}.{part}"));
        Ok(Mlp {
            gate_up: self.linear(format, &[(&gate, intermediate), (&up, intermediate)], hidden, false)?,
            down: self.linear(format, &[(&down, hidden)], intermediate, false)?,
        })
    }
}
