//! A tar archive of a few texts in one folder: the part of POSIX ustar that this takes. Pure but for the writer.

use std::io::{self, Write};

const BLOCK: usize = 512;
/// Longest name that a header holds.
const NAME_BYTES: usize = 100;

/// Writes `files` below `folder`, readable by their owner alone.
pub fn write(out: &mut impl Write, folder: &str, files: &[(String, Vec<u8>)], at_s: u64) -> io::Result<()> {
    for (name, content) in files {
        out.write_all(&header(&format!("{folder}/{name}"), content.len(), at_s)?)?;
        out.write_all(content)?;
        out.write_all(&[0; BLOCK][..content.len().next_multiple_of(BLOCK) - content.len()])?;
    }
    out.write_all(&[0; 2 * BLOCK])?;
    out.flush()
}

fn header(name: &str, bytes: usize, at_s: u64) -> io::Result<[u8; BLOCK]> {
    if name.len() > NAME_BYTES {
        return Err(io::Error::other(format!("the name {name} is longer than {NAME_BYTES} bytes")));
    }
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{bytes:011o}\0"));
    put(136, &format!("{at_s:011o}\0"));
    // The checksum counts its own field as blanks.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_tar_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let files = [("a.txt".to_owned(), b"one".to_vec()), ("b/c.txt".to_owned(), vec![b'x'; 1000])];
        write(&mut std::fs::File::create(&path).unwrap(), "izar-support", &files, 1_795_521_600).unwrap();
        let untar = std::process::Command::new("tar").arg("xf").arg(&path).current_dir(dir.path()).status().unwrap();
        assert!(untar.success());
        for (name, content) in files {
            assert_eq!(std::fs::read(dir.path().join("izar-support").join(name)).unwrap(), content);
        }
        assert!(header(&"x".repeat(101), 1, 1).is_err());
    }
}
