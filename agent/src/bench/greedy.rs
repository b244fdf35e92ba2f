//! `bench greedy`: our greedy answers beside those of another program for the same weights, token by token.
//!
//! Two correct programs round differently, and where two tokens are almost equally likely they may part. So an answer
//! passes if it is equal, or parts where the two best tokens lie, by the weights in f32, no further apart than
//! [`ERRORS`] times the median error that quantization makes in the logits of such tokens: ours, or theirs if they tell
//! their logits and err more.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Args;
use izar_common::chat::{Finish, JobEvent, Token};
use izar_common::wire::agent::Quant;
use serde::{Deserialize, Serialize};

use super::arguments::EngineArguments;
use super::drive::{Drive, Ends};
use super::local::Local;
use super::logits::{Plain, two_best};
use super::median;

/// Errors of quantization that two tokens may lie apart where answers part.
const ERRORS: f64 = 3.0;

/// Answers at most, and bytes of the file that holds them.
const ANSWERS_LIMIT: u64 = 16 << 20;

/// What is compared.
#[derive(Debug, Args)]
pub struct Options {
    /// A .gguf file, or a folder in Hugging Face form
    #[arg(long)]
    pub model: PathBuf,
    /// The other program's answers: JSON, `[{"text": "…", "prompt": [1, 2], "answer": [3, 4], "best": …}]`; `best` may be
    /// left out, else it has for each token of the answer the two best ones: `[[token, logit], [token, logit]]`
    #[arg(long)]
    pub against: PathBuf,
    /// How weights are kept: f32, f16, int8 or int4
    #[arg(long, default_value = "int4")]
    pub quant: Quant,
    #[command(flatten)]
    pub engine: EngineArguments,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What the other program was asked and said. An end token is part of its answer.
#[derive(Debug, Deserialize)]
struct Theirs {
    text: String,
    prompt: Vec<Token>,
    answer: Vec<Token>,
    #[serde(default)]
    best: Best,
}

/// All answers.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub quant: Quant,
    /// The median error of a logit of one of the two best tokens: ours, and theirs if it is known.
    pub median_error: f64,
    pub their_median_error: Option<f64>,
    /// Logits that were compared.
    pub logits: usize,
    /// What two tokens may lie apart where answers part.
    pub allowed_gap: f64,
    pub equal: usize,
    pub passed: usize,
    pub answers: Vec<Answer>,
}

/// One prompt.
#[derive(Debug, Serialize)]
pub struct Answer {
    pub text: String,
    pub tokens: usize,
    /// We cut the text into the same tokens.
    pub same_prompt: bool,
    pub ours: Vec<Token>,
    pub theirs: Vec<Token>,
    /// Where the answers part, and how far the two best tokens lie apart there in f32.
    pub parts_at: Option<usize>,
    pub gap: Option<f64>,
    pub passes: bool,
}

/// The two best tokens after each position of an answer, in f32.
type Best = Vec<[(Token, f32); 2]>;

/// Compares.
pub fn measure(options: &Options) -> anyhow::Result<Report> {
    let model = Local::open(&options.model)?;
    let theirs = answers(options)?;
    let text = model.text()?;
    let ours = ask(&model, options, &theirs, text.eos())?;
    let best = {
        let mut plain = Plain::exact(&model, &options.engine)?;
        theirs.iter().map(|each| likeliest(&mut plain, each)).collect::<anyhow::Result<Vec<Best>>>()?
    };
    let errors = {
        let mut plain = Plain::load(&model, &options.engine.options(options.quant, 1))?;
        let mut errors = Vec::new();
        for (each, best) in theirs.iter().zip(&best) {
            differences(&mut plain, each, best, &mut errors)?;
        }
        errors
    };
    let median_error = median(&errors).context("there is no answer to compare")?;
    let their_median_error = median(&their_errors(&theirs, &best));
    let allowed_gap = median_error.max(their_median_error.unwrap_or(0.0)) * ERRORS;
    let mut out = Vec::new();
    for ((theirs, ours), best) in theirs.into_iter().zip(ours).zip(best) {
        let parts_at = part(&ours, &theirs.answer);
        let gap = parts_at.and_then(|at| best.get(at)).map(|[first, second]| f64::from(first.1 - second.1));
        let same_prompt = text.encode(&theirs.text).is_ok_and(|prompt| prompt == theirs.prompt);
        let close = gap.is_some_and(|gap| gap <= allowed_gap);
        out.push(Answer {
            tokens: theirs.answer.len(),
            passes: same_prompt && (parts_at.is_none() || close),
            text: theirs.text,
            theirs: theirs.answer,
            same_prompt,
            ours,
            parts_at,
            gap,
        });
    }
    Ok(Report {
        model: model.name(),
        quant: options.quant,
        median_error,
        their_median_error,
        logits: errors.len(),
        allowed_gap,
        equal: out.iter().filter(|a| a.parts_at.is_none()).count(),
        passed: out.iter().filter(|a| a.passes).count(),
        answers: out,
    })
}

fn answers(options: &Options) -> anyhow::Result<Vec<Theirs>> {
    let path = &options.against;
    let context = || format!("read the answers {}", path.display());
    let bytes = std::fs::metadata(path).with_context(context)?.len();
    ensure!(bytes <= ANSWERS_LIMIT, "{} has {bytes} bytes; use up to {ANSWERS_LIMIT}", path.display());
    let theirs: Vec<Theirs> =
        serde_json::from_slice(&std::fs::read(path).with_context(context)?).with_context(context)?;
    for (i, each) in theirs.iter().enumerate() {
        ensure!(!each.prompt.is_empty(), "{}: answer {i} has no prompt", path.display());
        ensure!(!each.answer.is_empty(), "{}: answer {i} has no tokens", path.display());
    }
    Ok(theirs)
}

/// Our answers through the engine, all at once, as long as theirs. An answer that was ended has the end token at its
/// end, as theirs; the engine does not give it, so the first of the model's stands for it if theirs is another.
fn ask(model: &Local, options: &Options, theirs: &[Theirs], eos: &[Token]) -> anyhow::Result<Vec<Vec<Token>>> {
    let mut drive = Drive::start(model, &options.engine.options(options.quant, theirs.len()))?;
    let submit = |each: &Theirs| drive.submit(&each.prompt, each.answer.len(), 0.0, Ends::Heeded);
    let jobs: Vec<u64> = theirs.iter().map(submit).collect();
    let (mut ours, mut ended) = (vec![Vec::new(); theirs.len()], 0);
    while ended < theirs.len() {
        for (number, event) in drive.events()? {
            let at = jobs.iter().position(|job| *job == number).context("an event of no job")?;
            match event {
                JobEvent::Tokens { tokens, .. } => ours[at].extend(tokens),
                JobEvent::Done { finish: Finish::Stop, .. } => {
                    let their_end = theirs[at].answer.get(ours[at].len()).filter(|t| eos.contains(t));
                    ours[at].extend(their_end.or(eos.first()));
                    ended += 1;
                }
                JobEvent::Done { .. } => ended += 1,
                JobEvent::Failed { reason, .. } => anyhow::bail!("a job failed: {reason}"),
            }
        }
    }
    Ok(ours)
}

/// The first place where two answers differ. One that is longer differs where the other ends.
fn part(ours: &[Token], theirs: &[Token]) -> Option<usize> {
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    (same < ours.len().max(theirs.len())).then_some(same)
}

/// Prompt and answer, without the last token: nothing is predicted after it.
fn read(each: &Theirs) -> Vec<Token> {
    let mut tokens = each.prompt.clone();
    tokens.extend(&each.answer[..each.answer.len() - 1]);
    tokens
}

fn likeliest(plain: &mut Plain, each: &Theirs) -> anyhow::Result<Best> {
    let mut best = Vec::with_capacity(each.answer.len());
    plain.read(&read(each), |at, logits| {
        if at + 1 >= each.prompt.len() {
            best.push(two_best(logits).map(|token| (token, logits[token as usize])));
        }
    })?;
    Ok(best)
}

/// How far the logits that they tell are from those in f32, where these are known.
fn their_errors(theirs: &[Theirs], exact: &[Best]) -> Vec<f64> {
    let mut errors = Vec::new();
    for (told, exact) in theirs.iter().zip(exact).flat_map(|(each, exact)| each.best.iter().zip(exact)) {
        for (token, logit) in told {
            let exact = exact.iter().find(|(other, _)| other == token);
            errors.extend(exact.map(|(_, exact)| f64::from((logit - exact).abs())));
        }
    }
    errors
}

/// How far the logits of the two best tokens are from those in f32.
fn differences(plain: &mut Plain, each: &Theirs, best: &Best, out: &mut Vec<f64>) -> anyhow::Result<()> {
    plain.read(&read(each), |at, logits| {
        if let Some(best) = (at + 1).checked_sub(each.prompt.len()).and_then(|at| best.get(at)) {
            out.extend(best.iter().map(|(token, exact)| f64::from((logits[*token as usize] - exact).abs())));
        }
    })
}

impl Report {
    /// Whether every answer passes.
    pub fn holds(&self) -> bool {
        self.failed() == 0
    }
    pub fn failed(&self) -> usize {
        self.answers.len() - self.passed
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
        line(format!("{}, {}: {} of {} answers are equal", self.model, self.quant, self.equal, self.answers.len()));
        line(format!(
            "median error of {} logits {:.4}, theirs {}, so answers may part where two tokens lie {:.4} apart",
            self.logits,
            self.median_error,
            self.their_median_error.map_or("unknown".to_owned(), |error| format!("{error:.4}")),
            self.allowed_gap
        ));
        for answer in &self.answers {
            let what = match (answer.parts_at, answer.gap) {
                _ if !answer.same_prompt => "other tokens of the prompt".to_owned(),
                (None, _) => format!("equal, {} tokens", answer.tokens),
                (Some(at), Some(gap)) => format!("parts at token {at} of {}, gap {gap:.4}", answer.tokens),
                (Some(at), None) => format!("parts at token {at}, where one has ended"),
            };
            let begin: String = answer.text.chars().take(40).collect();
            line(format!("{} {begin:<42}{what}", if answer.passes { "ok  " } else { "FAIL" }));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn their_errors_are_those_of_tokens_that_both_know() {
        let each = |best| Theirs { text: String::new(), prompt: vec![1], answer: vec![2], best };
        let theirs = [each(vec![[(2, 4.0), (7, 3.5)]]), each(Vec::new())];
        let exact = [vec![[(2, 4.25), (3, 3.0)]], vec![[(2, 1.0), (3, 0.5)]]];
        assert_eq!(their_errors(&theirs, &exact), [0.25]);
    }

    #[test]
    fn answers_part_where_they_first_differ() {
        for (ours, theirs, at) in [
            (&[1, 2, 3][..], &[1, 2, 3][..], None),
            (&[1, 2, 3], &[1, 5, 3], Some(1)),
            (&[1, 2], &[1, 2, 3], Some(2)),
            (&[1, 2, 3], &[1, 2], Some(2)),
        ] {
            assert_eq!(part(ours, theirs), at);
        }
    }
}
