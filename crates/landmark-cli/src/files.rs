//! Files that a command writes for its user: whole, or not at all.

use std::io::{self, Write};
use std::path::Path;

/// Writes a file under another name beside, and gives it its name once it is on the disk. What is no plain file, such as
/// `/dev/stdout`, is written into.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
        return std::fs::OpenOptions::new().write(true).open(path)?.write_all(bytes);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".landmark-").suffix(".tmp").tempfile_in(folder)?;
    #[cfg(unix)]
    {
        // A temporary file is its owner's alone; this one is to be read as any other.
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_stays_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.csv");
        write(&path, b"longer than").unwrap();
        write(&path, b"this").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"this");
        assert!(write(folder.path(), b"a folder").is_err());
        assert!(write(&folder.path().join("missing/a.csv"), b"").is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }
}
