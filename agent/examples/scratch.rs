//! Temporary measurement; removed before delivery.
use izar_agent::model::weights::Source;
use izar_agent::model::{self, Batch, SequenceId, Wants};
use izar_common::chat::{Message, Role};
use std::path::Path;
use std::time::Instant;
fn argmax(row: &[f32]) -> u32 { (0..row.len()).fold(0, |b, i| if row[i] > row[b] { i } else { b }) as u32 }
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let threads: usize = std::env::args().nth(2).unwrap_or("2".into()).parse().unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| run(&path));
}
fn run(path: &str) {
    let t = Instant::now();
    let source = Source::open(Path::new(path)).unwrap();
    let config = source.config().unwrap();
    println!("{config:?}");
    let mut model = model::build(&config, &source).unwrap();
    println!("load {:?}", t.elapsed());
    let t = Instant::now();
    let Source::Gguf { file, .. } = &source else { panic!() };
    let text = std::sync::Arc::new(izar_common::text::Text::new(&izar_common::text::Bundle::from_gguf(file).unwrap()).unwrap());
    println!("text {:?} eos {:?}", t.elapsed(), source.eos().unwrap());
    let prompt = text.encode_chat(&[Message { role: Role::User, content: "What is the capital of France?".into() }]).unwrap();
    println!("prompt {} {:?}", prompt.len(), prompt);
    let mut batch = Batch::default();
    let id = SequenceId(0);
    batch.push(id, 0, &prompt, Wants::Last);
    let t = Instant::now();
    let mut next = argmax(model.forward(&batch).rows().next().unwrap());
    println!("prefill {:?}", t.elapsed());
    let (mut n, mut out, t) = (prompt.len(), vec![], Instant::now());
    while !source_eos(&source).contains(&next) && out.len() < 64 {
        out.push(next);
        let mut batch = Batch::default();
        batch.push(id, n, &[next], Wants::Last);
        n += 1;
        next = argmax(model.forward(&batch).rows().next().unwrap());
    }
    let e = t.elapsed().as_secs_f64();
    let mut d = text.decoder();
    let mut s = String::new();
    for t in &out { s += &d.push(*t); }
    println!("{s:?} {} tokens {:.1} tok/s", out.len(), out.len() as f64 / e);
    model.close(id);
    let pr: Vec<u32> = (0..128).map(|i| 1000 + i * 7).collect();
    let mut best = f64::MAX;
    for i in 0..4 { let mut b = Batch::default(); b.push(SequenceId(100 + i), 0, &pr, Wants::Last); let t = Instant::now(); model.forward(&b); best = best.min(t.elapsed().as_secs_f64()); model.close(SequenceId(100 + i)); }
    println!("pp128 {:.1} ms {:.0} tok/s", best * 1e3, 128.0 / best);
    for n in [1usize, 8, 32] {
        for i in 0..n { let mut b = Batch::default(); b.push(SequenceId(1000 + i as u64), 0, &pr, Wants::Nothing); model.forward(&b); }
        let mut best = f64::MAX;
        for s in 0..10 { let mut b = Batch::default(); for i in 0..n { b.push(SequenceId(1000 + i as u64), 128 + s, &[5], Wants::Last); } let t = Instant::now(); let l = model.forward(&b); for r in l.rows() { argmax(r); } best = best.min(t.elapsed().as_secs_f64()); }
        println!("tg b={n} {:.1} ms {:.1} tok/s", best * 1e3, n as f64 / best);
        for i in 0..n { model.close(SequenceId(1000 + i as u64)); }
    }
}
fn source_eos(s: &Source) -> Vec<u32> { match s { Source::Gguf { file, .. } => vec![file.u32("tokenizer.ggml.eos_token_id").unwrap()], _ => vec![] } }
