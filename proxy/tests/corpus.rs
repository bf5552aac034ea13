//! The inputs of the fuzz targets (`fuzz/corpus/`), among them all that has ever failed, as ordinary tests.

#[path = "../../fuzz/src/checks.rs"]
mod checks;

#[test]
fn inputs_that_fuzzers_have_found_or_started_from() {
    for (name, check) in checks::ALL {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() > 4, "{}: the corpus is missing", folder.display());
        for file in files {
            eprintln!("{}", file.display());
            check(&std::fs::read(file).unwrap());
        }
    }
}
