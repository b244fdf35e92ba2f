//! Asking root's hand: one line to its socket, one line back (`remediate`).

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use izar_common::id::GpuId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long an answer may take: systemd ends the hand after 120 s.
const LIMIT: Duration = Duration::from_secs(130);

/// Bytes of an answer that are read; what a program said when it failed is in it.
const ANSWER_BYTES: u64 = 4096;

/// A GPU as the driver writes it.
pub fn uuid(gpu: &GpuId) -> String {
    format!("GPU-{}", gpu.as_str().trim_start_matches("gpu-"))
}

/// Fails if there is nothing that could be asked.
pub fn is_there(socket: &Path) -> Result<(), String> {
    match std::fs::metadata(socket) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => Err(format!("{} is no socket", socket.display())),
        Err(error) => Err(format!("{}: {error}; is izar-gpu.socket enabled?", socket.display())),
    }
}

/// Asks for something; fails with the hand's words, or with why it cannot be asked.
pub async fn ask(socket: &Path, request: &str) -> Result<(), String> {
    let asking = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("{request}\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).trim().to_owned())
    };
    match timeout(LIMIT, asking).await {
        Ok(Ok(answer)) if answer == "ok" || answer.starts_with("ok ") => Ok(()),
        Ok(Ok(answer)) if answer.is_empty() => Err(format!("{request}: {} gave no answer", socket.display())),
        Ok(Ok(answer)) => Err(format!("{request}: {answer}")),
        Ok(Err(error)) => Err(format!("{request}: {}: {error}", socket.display())),
        Err(_) => Err(format!("{request}: no answer within {} s", LIMIT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[test]
    fn a_gpu_is_written_as_the_driver_does() {
        let gpu = "gpu-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff".parse().unwrap();
        assert_eq!(uuid(&gpu), "GPU-5f2a1c3e-0b1d-4c5e-9f80-aabbccddeeff");
    }

    /// What is made of a hand's answer.
    async fn answered(answer: &'static str) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("gpu.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let hand = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 7];
            stream.read_exact(&mut line).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            line
        });
        let answer = ask(&socket, "reboot").await;
        assert_eq!(&hand.await.unwrap(), b"reboot\n");
        answer
    }

    #[tokio::test]
    async fn a_hand_says_ok_or_why_not() {
        assert_eq!(answered("ok\n").await, Ok(()));
        assert_eq!(answered("ok ended=2\n").await, Ok(()));
        assert_eq!(answered("refused: not a request\n").await, Err("reboot: refused: not a request".into()));
        assert!(answered("").await.unwrap_err().contains("gave no answer"));
    }

    #[tokio::test]
    async fn a_hand_that_is_not_there_is_named() {
        let nowhere = Path::new("/nowhere/gpu.sock");
        for error in [ask(nowhere, "reboot").await.unwrap_err(), is_there(nowhere).unwrap_err()] {
            assert!(error.contains("/nowhere/gpu.sock"), "{error}");
        }
        assert!(is_there(Path::new("/")).unwrap_err().contains("no socket"));
    }
}
