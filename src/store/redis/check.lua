-- KEYS: a key with the prefix of the records. ARGV: 'replicated' or '', 'cluster' or ''.
--
-- Returns the commands that this user may not run. Fails on a read-only replica, like the other
-- scripts. Changes nothing.
local key, missing = KEYS[1], {}
local function need(name, ...)
  -- Servers that only resemble Redis may lack this function. Then the operation that needs a
  -- missing right reports it.
  if not redis.acl_check_cmd then return end
  -- The function raises an error if the server does not know the command, for example because it
  -- was renamed.
  local is_known, is_allowed = pcall(redis.acl_check_cmd, name, ...)
  if not (is_known and is_allowed) then table.insert(missing, name) end
end
need('evalsha', '', '1', key)
need('get', key)
need('set', key, '', 'PXAT', '1')
need('del', key)
need('pexpireat', key, '1')
need('time')
if ARGV[1] ~= '' then need('wait', '1', '1') end
if ARGV[2] ~= '' then need('asking') end
local tried = redis.pcall('PEXPIREAT', key, 1, 'GT')
if type(tried) == 'table' and string.find(tried.err, 'READONLY', 1, true) then return tried end
return missing
