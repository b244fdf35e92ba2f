//! From a bearer key to who asks.
//!
//! The key itself is hashed at once, is compared only as a hash, and appears nowhere else.

use axum::http::{HeaderMap, header};
use izar_common::id::TenantId;
use izar_common::seal::Pepper;

use super::error::Error;
use crate::state::{Config, Key, KeyStatus, Project};

/// Longest key that is hashed; ours have about 50 bytes.
const KEY_BYTES: usize = 512;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub tenant: TenantId,
    /// The tenant's share of what is scarce.
    pub weight: u32,
    pub project: Project,
    pub key: Key,
}

/// Finds the key that a request carries.
pub fn authenticate(headers: &HeaderMap, pepper: &Pepper, config: &Config) -> Result<Caller, Error> {
    let bearer = bearer(headers)?;
    let key = config.keys_by_hash.get(&pepper.keyed_hash(bearer)).ok_or(Error::WrongKey)?;
    if key.status != KeyStatus::Active {
        return Err(Error::WrongKey);
    }
    let project = config.projects.get(&key.project).ok_or(Error::WrongKey)?;
    let tenant = config.tenants.get(&project.tenant).ok_or(Error::WrongKey)?;
    Ok(Caller { tenant: tenant.id.clone(), weight: tenant.weight, project: project.clone(), key: key.clone() })
}

fn bearer(headers: &HeaderMap) -> Result<&str, Error> {
    let value = headers.get(header::AUTHORIZATION).ok_or(Error::NoKey)?;
    let text = value.to_str().map_err(|_| Error::WrongKey)?;
    let (scheme, key) = text.split_once(' ').ok_or(Error::NoKey)?;
    let key = key.trim();
    match scheme.eq_ignore_ascii_case("bearer") && !key.is_empty() {
        true if key.len() <= KEY_BYTES => Ok(key),
        true => Err(Error::WrongKey),
        false => Err(Error::NoKey),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Tenant;
    use izar_common::clock::Hlc;
    use izar_common::id::{KeyId, ProjectId};

    const SECRET: &str = "izar-test-secret";

    fn config(pepper: &Pepper, status: KeyStatus) -> Config {
        let (tenant, project) = (TenantId::new("bank").unwrap(), ProjectId::new("desk").unwrap());
        let key = Key {
            id: KeyId::new("k1").unwrap(),
            project: project.clone(),
            secret_hash: pepper.keyed_hash(SECRET),
            max_concurrent: 4,
            status,
            created: Hlc::default(),
            note: String::new(),
        };
        let mut config = Config::default();
        config.keys_by_hash.insert(key.secret_hash, key);
        config.tenants.insert(tenant.clone(), Tenant::new(tenant.clone()));
        config.projects.insert(project.clone(), Project::new(project, tenant));
        config
    }

    fn check(authorization: Option<&str>, status: KeyStatus, expected: Result<&str, Error>) {
        let pepper = Pepper::from_bytes([7; 32]);
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        let caller = authenticate(&headers, &pepper, &config(&pepper, status));
        assert_eq!(
            caller.as_ref().map(|caller| caller.tenant.as_str()),
            expected.as_ref().copied(),
            "{authorization:?}"
        );
    }

    #[test]
    fn only_an_active_key_gets_in() {
        let good = format!("Bearer {SECRET}");
        check(Some(&good), KeyStatus::Active, Ok("bank"));
        check(Some(&format!("bearer  {SECRET} ")), KeyStatus::Active, Ok("bank"));
        check(Some(&good), KeyStatus::Revoked, Err(Error::WrongKey));
        check(Some("Bearer other"), KeyStatus::Active, Err(Error::WrongKey));
        check(Some(&format!("Bearer {}", "x".repeat(5000))), KeyStatus::Active, Err(Error::WrongKey));
        check(Some(&format!("Basic {SECRET}")), KeyStatus::Active, Err(Error::NoKey));
        check(Some("Bearer "), KeyStatus::Active, Err(Error::NoKey));
        check(Some(SECRET), KeyStatus::Active, Err(Error::NoKey));
        check(None, KeyStatus::Active, Err(Error::NoKey));
    }
}
