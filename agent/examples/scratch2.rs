//! Temporary measurement; removed before delivery.
use burn::tensor::{Device, DType, Tensor, TensorData};
use std::time::Instant;
fn t<const D: usize>(n: usize, shape: [usize; D]) -> Tensor<D> {
    let v: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
    Tensor::from_data(TensorData::new(v, shape), (&Device::flex(), DType::F32))
}
fn time(mut f: impl FnMut()) -> f64 { let mut b = f64::MAX; for _ in 0..12 { let s = Instant::now(); f(); b = b.min(s.elapsed().as_secs_f64()); } b * 1e3 }
fn main() {
    let threads: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run);
}
fn run() {
    let flush = t(16 << 20, [16 << 20]);
    for (i, o) in [(576, 3072), (1536, 576), (576, 49152)] {
        let nn = t(i * o, [i, o]);
        let nt = t(i * o, [o, i]);
        for m in [1usize, 2, 8, 32, 128] {
            let x = t(m * i, [m, i]);
            let cold = || { let _ = flush.clone().sum(); };
            let _ = cold;
            let mut s = format!("in {i} out {o} rows {m}: nn {:.2} nt {:.2}", time(|| { x.clone().matmul(nn.clone()); }), time(|| { x.clone().matmul(nt.clone().transpose()); }));
            for w in [16usize, 32, 64, 192] {
                let b = t(i * o, [o / w, i, w]);
                let bt = t(i * o, [o / w, w, i]);
                let x3 = x.clone().unsqueeze::<3>();
                s += &format!(" | w{w} {:.2}", time(|| { let _ = x3.clone().matmul(b.clone()).swap_dims(0, 1).reshape([m, o]); }));
                s += &format!(" t{:.2}", time(|| { let _ = x3.clone().matmul(bt.clone().swap_dims(1, 2)).swap_dims(0, 1).reshape([m, o]); }));
            }
            println!("{s}  GB/s nn {:.1}", 0.0);
        }
    }
}
