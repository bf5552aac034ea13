//! Volumes: folders under the pod's own folder, filled from the API and kept up to date.
//!
//! Files that come from the API are replaced all at once: they lie in a folder named after the time, `..data` points to it, and
//! a change renames a new `..data` over the old one. A reader sees the old files or the new ones, never a mixture.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fields::{self, Objects};
use super::launch::Mount;
use crate::json::{flag, list, number, text};

/// A file's content and mode.
pub(crate) type Files = BTreeMap<String, (Vec<u8>, u32)>;

/// Issues tokens: audience, lifetime in seconds.
pub(crate) trait Tokens {
    /// A token for the pod's service account, or why there is none.
    fn token(&self, audience: &str, seconds: u64) -> Result<String, String>;
}

/// The tokens of one pod, kept until four fifths of their life are over.
#[derive(Debug, Default)]
pub(crate) struct TokenCache(BTreeMap<(String, u64), (String, Instant)>);

impl TokenCache {
    fn get(&mut self, source: &impl Tokens, audience: &str, seconds: u64) -> Result<String, String> {
        let key = (audience.to_owned(), seconds);
        if let Some((token, renew)) = self.0.get(&key)
            && Instant::now() < *renew
        {
            return Ok(token.clone());
        }
        let token = source.token(audience, seconds)?;
        self.0.insert(key, (token.clone(), Instant::now() + Duration::from_secs(seconds * 4 / 5)));
        Ok(token)
    }
}

fn mode(item: &Value, default: u32) -> u32 {
    item.get("mode").and_then(Value::as_u64).map_or(default, |m| m as u32)
}

fn from_object(
    files: &mut Files,
    objects: &impl Objects,
    ns: &str,
    secret: bool,
    source: &Value,
    default: u32,
) -> Result<(), String> {
    let name = if source.get("secretName").is_some() { text(source, "/secretName") } else { text(source, "/name") };
    let optional = flag(source, "/optional");
    let what = if secret { "secret" } else { "configmap" };
    let Some(object) = objects.find(secret, ns, name) else {
        return if optional { Ok(()) } else { Err(format!("{what} \"{name}\" not found")) };
    };
    let mut data = fields::data(&object, secret);
    let items = list(source, "/items");
    if items.is_empty() {
        files.extend(data.iter().map(|(key, value)| (key.clone(), (value.clone(), default))));
    }
    for item in items {
        let key = text(item, "/key");
        match data.remove(key) {
            Some(value) => {
                files.insert(text(item, "/path").to_owned(), (value, mode(item, default)));
            }
            None if optional => {}
            None => return Err(format!("{what} references non-existent config key: {key} (in {what} \"{name}\")")),
        }
    }
    Ok(())
}

fn from_downward(files: &mut Files, pod: &Value, source: &Value, default: u32) -> Result<(), String> {
    for item in list(source, "/items") {
        let value = match item.get("resourceFieldRef") {
            Some(reference) => fields::resource(pod, &json!({}), reference)?,
            None => fields::field(pod, text(item, "/fieldRef/fieldPath"))?,
        };
        files.insert(text(item, "/path").to_owned(), (value.into_bytes(), mode(item, default)));
    }
    Ok(())
}

/// The files of a volume that comes from the API; `None` for other volumes.
///
/// # Errors
/// Something that isn't optional is missing.
pub(crate) fn files(
    pod: &Value,
    volume: &Value,
    objects: &impl Objects,
    source: &impl Tokens,
    cache: &mut TokenCache,
) -> Result<Option<Files>, String> {
    let ns = text(pod, "/metadata/namespace");
    let mut files = Files::new();
    let default = |v: &Value| number(v, "/defaultMode", 0o644) as u32;
    if let Some(map) = volume.get("configMap") {
        from_object(&mut files, objects, ns, false, map, default(map))?;
    } else if let Some(secret) = volume.get("secret") {
        from_object(&mut files, objects, ns, true, secret, default(secret))?;
    } else if let Some(downward) = volume.get("downwardAPI") {
        from_downward(&mut files, pod, downward, default(downward))?;
    } else if let Some(projected) = volume.get("projected") {
        let default = default(projected);
        for part in list(projected, "/sources") {
            if let Some(token) = part.get("serviceAccountToken") {
                let seconds = number(token, "/expirationSeconds", 3600).max(60) as u64;
                let value = cache.get(source, text(token, "/audience"), seconds)?;
                files.insert(text(token, "/path").to_owned(), (value.into_bytes(), default));
            } else if let Some(map) = part.get("configMap") {
                from_object(&mut files, objects, ns, false, map, default)?;
            } else if let Some(secret) = part.get("secret") {
                from_object(&mut files, objects, ns, true, secret, default)?;
            } else if let Some(downward) = part.get("downwardAPI") {
                from_downward(&mut files, pod, downward, default)?;
            } else {
                return Err("projected.sources: this kind of source is not supported by the playground".to_owned());
            }
        }
    } else {
        return Ok(None);
    }
    Ok(Some(files))
}

/// Puts files in place, all at once. Nothing happens if they are the same already.
pub(crate) fn write(dir: &Path, files: &Files, group: Option<u32>) -> io::Result<()> {
    let link = dir.join("..data");
    let old = fs::read_link(&link).ok();
    let same = old.is_some()
        && files.iter().all(|(name, (content, _))| fs::read(link.join(name)).is_ok_and(|now| now == *content))
        && count(&link) == files.len();
    if same {
        return Ok(());
    }
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let version = format!("..{stamp}");
    let folder = dir.join(&version);
    fs::create_dir_all(&folder)?;
    for (name, (content, mode)) in files {
        let path = folder.join(safe(name)?);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content)?;
        let shared = if group.is_some() { mode | 0o040 } else { *mode };
        fs::set_permissions(&path, fs::Permissions::from_mode(shared))?;
        if let Some(gid) = group {
            std::os::unix::fs::chown(&path, None, Some(gid))?;
        }
    }
    let next = dir.join("..data_tmp");
    let _ = fs::remove_file(&next);
    symlink(&version, &next)?;
    fs::rename(&next, &link)?;
    let tops: std::collections::BTreeSet<&str> = files.keys().filter_map(|n| n.split('/').next()).collect();
    for top in &tops {
        if fs::symlink_metadata(dir.join(top)).is_err() {
            symlink(format!("..data/{top}"), dir.join(top))?;
        }
    }
    for entry in fs::read_dir(dir)?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !tops.contains(&*name) {
            fs::remove_file(entry.path())?;
        }
    }
    if let Some(old) = old {
        let _ = fs::remove_dir_all(dir.join(old));
    }
    Ok(())
}

fn safe(name: &str) -> io::Result<&str> {
    if name.is_empty() || name.starts_with('/') || name.split('/').any(|part| part == "..") {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("path {name:?} leads out of the volume")));
    }
    Ok(name)
}

fn count(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries.flatten().map(|e| if e.path().is_dir() { count(&e.path()) } else { 1 }).sum()
}

/// Makes the folder of a volume that doesn't come from the API. `None`: this kind is not supported.
pub(crate) fn plain(volume: &Value, dir: &Path, group: Option<u32>) -> io::Result<Option<PathBuf>> {
    if let Some(host) = volume.get("hostPath") {
        let path = PathBuf::from(text(host, "/path"));
        if text(host, "/type") == "DirectoryOrCreate" {
            fs::create_dir_all(&path)?;
        }
        return Ok(path.exists().then_some(path));
    }
    if volume.get("emptyDir").is_none() {
        return Ok(None);
    }
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o777))?;
    if let Some(gid) = group {
        std::os::unix::fs::chown(dir, None, Some(gid))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o2777))?;
    }
    Ok(Some(dir.to_owned()))
}

/// The bind mounts of a container. `places` has the folder of each volume.
///
/// # Errors
/// A mount names no volume of the pod.
pub(crate) fn mounts(
    pod: &Value,
    container: &Value,
    places: &BTreeMap<String, PathBuf>,
    env: &[(String, String)],
) -> Result<Vec<Mount>, String> {
    let mut out = Vec::new();
    for mount in list(container, "/volumeMounts") {
        let name = text(mount, "/name");
        let place = places.get(name).ok_or_else(|| format!("volumeMounts: there is no volume \"{name}\""))?;
        let sub = match text(mount, "/subPathExpr") {
            "" => text(mount, "/subPath").to_owned(),
            expression => fields::expand(expression, env),
        };
        let mut from = place.clone();
        if !sub.is_empty() {
            from = place.join(safe(&sub).map_err(|e| format!("volumeMounts[{name}].subPath: {e}"))?);
            if !from.exists() {
                fs::create_dir_all(&from).map_err(|e| format!("volumeMounts[{name}].subPath: {e}"))?;
            }
            from = from.canonicalize().map_err(|e| format!("volumeMounts[{name}].subPath: {e}"))?;
        }
        let volume = list(pod, "/spec/volumes").iter().find(|v| v["name"] == name);
        let fixed =
            volume.is_some_and(|v| ["configMap", "secret", "projected", "downwardAPI"].iter().any(|k| v.get(k).is_some()));
        out.push(Mount { from, to: text(mount, "/mountPath").to_owned(), read_only: fixed || flag(mount, "/readOnly") });
    }
    // An outer mount has to come before one inside of it.
    out.sort_by_key(|m| m.to.matches('/').count());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_change_at_once_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let files = |pairs: &[(&str, &str)]| -> Files {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (v.as_bytes().to_vec(), 0o644))).collect()
        };
        write(dir.path(), &files(&[("a", "1"), ("b/c", "2")]), None).unwrap();
        let first = fs::read_link(dir.path().join("..data")).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("b/c")).unwrap(), "2");
        write(dir.path(), &files(&[("a", "1"), ("b/c", "2")]), None).unwrap();
        assert_eq!(fs::read_link(dir.path().join("..data")).unwrap(), first, "the same files are not written again");
        write(dir.path(), &files(&[("a", "9")]), None).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "9");
        assert!(fs::symlink_metadata(dir.path().join("b")).is_err() && !dir.path().join(first).exists());
        assert!(write(dir.path(), &files(&[("../x", "9")]), None).is_err());
    }
}
